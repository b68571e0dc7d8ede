"""As much of S3 as readers of models need, over a directory of this machine: what `stoker bench tiers` takes for remote.

`python -m stoker_cli.bench.s3_server ROOT` prints its URL as a line of JSON and serves until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from aiohttp import web

KEYS_MAX = 1000
"""In one answer to ListObjectsV2, as S3 has it."""
PIECE_BYTES = 256 * 1024
"""Sent at once when there is a limit to the rate."""
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class StoredObject(NamedTuple):
    """etag: with its quotes."""

    key: str
    size_bytes: int
    etag: str


class Span(NamedTuple):
    """Bytes of an object that were asked for."""

    offset: int
    size_bytes: int


class LocalS3:
    """Serves `<root>/<bucket>/<key>` on 127.0.0.1, read only: ListObjectsV2, and HEAD and GET with Range and If-Match.

    bytes_per_s: of all connections together; 0: no limit.  Signatures are not looked at. Requests and the bytes of objects
    that were sent are counted.
    """

    def __init__(self, root: Path, *, bytes_per_s: int = 0) -> None:
        self.root, self.bytes_per_s = root.resolve(), bytes_per_s
        self.requests = self.sent_bytes = 0
        self.url = ""
        self._runner: web.AppRunner | None = None
        self._sent_until_s = 0.0

    async def start(self, port: int = 0) -> None:
        """Raises OSError if the port is taken. 0: one that is free."""
        application = web.Application()
        application.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> LocalS3:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # What a server with faults does otherwise.

    def find(self, bucket: str, key: str) -> StoredObject | None:
        path = self.root / bucket / key
        if ".." in path.parts or "\0" in key or not path.is_file():
            return None
        status = path.stat()
        return StoredObject(key, status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"')

    def keys(self, bucket: str) -> Iterable[str]:
        folder = self.root / bucket
        return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    async def instead(self, bucket: str, key: str) -> web.Response | None:
        """An answer to give before anything is looked at. key: empty for a list."""
        return None

    def range_of(self, request: web.Request) -> str:
        return request.headers.get("Range", "")

    async def send(self, transport: asyncio.Transport, file: BinaryIO, span: Span) -> None:
        """Send an object's bytes. Raises OSError, ConnectionError."""
        loop = asyncio.get_running_loop()
        for piece in self._pieces(span):
            await self._paced(piece.size_bytes)
            if transport.is_closing():
                raise ConnectionResetError("who asked has left")
            await loop.sendfile(transport, file, piece.offset, piece.size_bytes)
            self.sent_bytes += piece.size_bytes

    def _pieces(self, span: Span) -> Iterator[Span]:
        size = PIECE_BYTES if self.bytes_per_s else max(span.size_bytes, 1)
        for done in range(0, span.size_bytes, size):
            yield Span(span.offset + done, min(size, span.size_bytes - done))

    async def _paced(self, size_bytes: int) -> None:
        if self.bytes_per_s:
            now_s = asyncio.get_running_loop().time()
            self._sent_until_s = max(self._sent_until_s, now_s) + size_bytes / self.bytes_per_s
            await asyncio.sleep(self._sent_until_s - now_s)

    # Requests.

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        bucket, _, key = unquote(request.raw_path.partition("?")[0].removeprefix("/")).partition("/")
        if (answer := await self.instead(bucket, key)) is not None:
            return answer
        if request.method not in ("GET", "HEAD"):
            return failure(405, "MethodNotAllowed")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket) or not (self.root / bucket).is_dir():
            return failure(404, "NoSuchBucket")
        return await self._object(request, bucket, key) if key else self._list(request, bucket)

    async def _object(self, request: web.Request, bucket: str, key: str) -> web.StreamResponse:
        found = self.find(bucket, key)
        if found is None:
            return failure(404, "NoSuchKey")
        if request.headers.get("If-Match", found.etag).strip('"') != found.etag.strip('"'):
            return failure(412, "PreconditionFailed")
        span, response = Span(0, found.size_bytes), web.StreamResponse()
        if asked := _RANGE.fullmatch(self.range_of(request)):
            begin, end = int(asked[1]), int(asked[2] or found.size_bytes)
            if begin >= found.size_bytes or end < begin:
                return failure(416, "InvalidRange")
            span = Span(begin, min(end + 1, found.size_bytes) - begin)
            response.set_status(206)
            response.headers["Content-Range"] = f"bytes {begin}-{begin + span.size_bytes - 1}/{found.size_bytes}"
        response.headers.update({"ETag": found.etag, "Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"})
        response.content_length = span.size_bytes
        with (self.root / bucket / key).open("rb") as file:
            await response.prepare(request)
            transport = request.transport
            if request.method == "GET" and span.size_bytes and isinstance(transport, asyncio.Transport):
                await self.send(transport, file, span)
        await response.write_eof()
        return response

    def _list(self, request: web.Request, bucket: str) -> web.Response:
        query = request.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        limit = min(int(query.get("max-keys", KEYS_MAX)), KEYS_MAX)
        after = query.get("continuation-token", "")
        # A key, or a group of keys up to the delimiter, which ends with it.
        found = sorted({_grouped(key, prefix, delimiter) for key in self.keys(bucket) if key.startswith(prefix)})
        page = [name for name in found if name > after][:limit]
        more = bool(page) and page[-1] != found[-1]
        encode = quote if query.get("encoding-type") == "url" else escape
        parts = [
            f"<Name>{bucket}</Name><Prefix>{encode(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>",
            f"<MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>",
        ]
        if encode is quote:
            parts.append("<EncodingType>url</EncodingType>")
        if more:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        for name in page:
            if delimiter and name.endswith(delimiter) and name != prefix:
                parts.append(f"<CommonPrefixes><Prefix>{encode(name)}</Prefix></CommonPrefixes>")
            elif (stored := self.find(bucket, name)) is not None:
                parts.append(
                    f"<Contents><Key>{encode(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(stored.etag)}</ETag><Size>{stored.size_bytes}</Size>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
        return _xml(200, f"<ListBucketResult {_NAMESPACE}>{''.join(parts)}</ListBucketResult>")


def failure(status: int, code: str, message: str = "") -> web.Response:
    """An error as S3 answers it."""
    return _xml(status, f"<Error><Code>{code}</Code><Message>{escape(message or code)}</Message></Error>")


def _xml(status: int, body: str) -> web.Response:
    return web.Response(status=status, text=_XML + body, content_type="application/xml")


def _grouped(key: str, prefix: str, delimiter: str) -> str:
    end = key.find(delimiter, len(prefix)) if delimiter else -1
    return key if end < 0 else key[: end + len(delimiter)]


async def _serve(root: Path) -> None:
    async with LocalS3(root) as server:
        print(json.dumps({"url": server.url}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
