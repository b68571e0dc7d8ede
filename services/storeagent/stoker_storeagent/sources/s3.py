"""Models in S3 and what speaks like it: a prefix of a bucket is the directory, and only keys directly under it belong to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import msgspec

from stoker_checkpoint.header import PREFIX_BYTES, Shard, header_length, parse_header, shown
from stoker_checkpoint.layout import (
    check_entries,
    check_names,
    check_small_bytes,
    file_in,
    find_shards,
    read_configs,
    small_names,
)
from stoker_checkpoint.manifest import build_manifest, is_plain_name
from stoker_core.errors import InvalidSettings, RefusedCheckpoint
from stoker_storeagent.ports import Inspected, OnBytes
from stoker_storeagent.sources.urls import S3Prefix, s3_prefix

if TYPE_CHECKING:
    from stoker_storeagent.sources.s3_session import S3Session

INSPECTED_AT_ONCE = 8
"""Files. Their headers are in memory meanwhile, at most 100 MB each."""
HEAD_BYTES = 64 * 1024
"""Asked of a shard at first: most headers are shorter, which saves a round trip."""

T = TypeVar("T")
R = TypeVar("R")


class S3Settings(msgspec.Struct, frozen=True, kw_only=True):
    """endpoint_url: empty takes what AWS_ENDPOINT_URL says, or else AWS itself.  anonymous: ask without credentials.

    connections: open at once.  stall_s: how long a server may send nothing.
    """

    endpoint_url: str = ""
    region: str = ""
    anonymous: bool = False
    connections: int = 16
    connect_s: float = 5.0
    stall_s: float = 20.0


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An object as a listing shows it. version: its ETag, without quotes."""

    size_bytes: int
    version: str


class S3Source:
    """Implements ports.Source for `s3://bucket/prefix`. A shard's version is its ETag, which every read insists on.

    Credentials are found as AWS's own tools find them. The client is made when it is first needed, which
    takes a second for imports and credentials.
    """

    kind = "s3"

    def __init__(self, settings: S3Settings) -> None:
        """Raises InvalidSettings for an endpoint that is none."""
        _check_endpoint(settings.endpoint_url)
        self._settings = settings
        self._opening = asyncio.Lock()
        self._session: S3Session | None = None

    async def close(self) -> None:
        async with self._opening:
            session, self._session = self._session, None
            if session is not None:
                await session.close()

    async def inspect(self, url: str) -> Inspected:
        place, session = s3_prefix(url), await self._opened()
        where = place.url
        entries = await self._list(session, place)
        names = entries.keys()
        check_names(where, names)

        async def shard(name: str) -> Shard:
            return await _read_shard(session, place, name, entries[name])

        contents = await self._small_files(session, place, entries)
        config = read_configs(where, contents)
        wanted, index = find_shards(where, names, contents)
        manifest = build_manifest(where, await _each(wanted, shard), index)
        return Inspected(
            source=where,
            manifest=manifest,
            config=config,
            small_files=contents,
            versions={name: entries[name].version for name in wanted},
        )

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        place = s3_prefix(url)
        if not is_plain_name(shard):
            raise RefusedCheckpoint(place.url, f"{shown(shard)} is no plain file name")
        session = await self._opened()
        await session.read(place.bucket, place.folder + shard, version, offset, into, on_bytes)

    async def _opened(self) -> S3Session:
        async with self._opening:  # one that could not be made is tried anew by who asks next
            if self._session is None:
                kind = await asyncio.to_thread(_session_kind)
                self._session = await kind.open(self._settings)
            return self._session

    async def _list(self, session: S3Session, place: S3Prefix) -> dict[str, Entry]:
        """Objects directly under the prefix, by name. What could be no file's name is left out, as what lies deeper is."""
        entries: dict[str, Entry] = {}
        count = 0
        async for page in session.pages(place.bucket, place.folder):
            count += page.entries
            check_entries(place.url, count)
            for key, size_bytes, version in page.objects:
                name = key.removeprefix(place.folder)
                if key.startswith(place.folder) and is_plain_name(name):
                    entries[name] = Entry(size_bytes=size_bytes, version=version)
        if not entries:
            raise RefusedCheckpoint(place.url, "nothing is stored under it")
        return entries

    async def _small_files(self, session: S3Session, place: S3Prefix, entries: dict[str, Entry]) -> dict[str, bytes]:
        names = small_names(entries)
        total_bytes = 0
        for name in names:
            total_bytes += entries[name].size_bytes
            check_small_bytes(place.url, name, total_bytes)

        async def content(name: str) -> bytes:
            return bytes(await _read_part(session, place, name, entries[name], 0, entries[name].size_bytes))

        return dict(zip(names, await _each(names, content), strict=True))


async def _read_shard(session: S3Session, place: S3Prefix, name: str, entry: Entry) -> Shard:
    """Its header, by ranges: never the weights."""
    path, size_bytes = file_in(place.url, name), entry.size_bytes
    head = await _read_part(session, place, name, entry, 0, min(HEAD_BYTES, size_bytes))
    length = header_length(path, bytes(head[:PREFIX_BYTES]), size_bytes)
    lacking = PREFIX_BYTES + length - len(head)
    if lacking > 0:
        head += await _read_part(session, place, name, entry, len(head), lacking)
    header = bytes(memoryview(head)[PREFIX_BYTES : PREFIX_BYTES + length])
    return await asyncio.to_thread(parse_header, path, name, header, size_bytes)


async def _read_part(
    session: S3Session, place: S3Prefix, name: str, entry: Entry, offset: int, size_bytes: int
) -> bytearray:
    content = bytearray(size_bytes)
    if size_bytes:  # there is no range of nothing
        await session.read(
            place.bucket, place.folder + name, entry.version, offset, memoryview(content), lambda done: None
        )
    return content


async def _each(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The results in the order of the items, some worked on at once. Raises the first failure, and ends the others then."""
    free = asyncio.Semaphore(INSPECTED_AT_ONCE)

    async def one(item: T) -> R:
        async with free:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _session_kind() -> type[S3Session]:
    """What imports the libraries for it, which takes a third of a second; so it is called in a thread."""
    from stoker_storeagent.sources.s3_session import S3Session

    return S3Session


def _check_endpoint(url: str) -> None:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query):
        raise InvalidSettings("the S3 endpoint must be http://host:port or https://host, without a user or query")
