"""Servers of S3 for tests: moto's, which knows more of S3 than we use, and ours over a directory, which fails on command."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from aiohttp import web
from tests.support.nats_server import START_TIMEOUT_S, die_with_parent, free_port

from stoker_cli.bench.s3_server import LocalS3, Span, StoredObject, failure


class FaultyS3(LocalS3):
    """Each attribute is a switch, and works from the next request on.

    errors: (status, code), each the answer to one request for an object.  error: the answer to every request, lists included.
    silent: no request is answered.  cut_after, stall_after: bytes of a body, after which the connection ends or nothing
    comes any more.  wrong_bytes: bodies of the right length with other contents.  whole: ranges are not understood.
    salt: a part of every ETag: the objects are others once it changes.  salts: each takes the place of `salt` after one object.
    missing, odd_keys: keys that are not there, and that only lists show.
    """

    def __init__(self, root: Path, *, bytes_per_s: int = 0) -> None:
        super().__init__(root, bytes_per_s=bytes_per_s)
        self.errors: list[tuple[int, str]] = []
        self.error: tuple[int, str] | None = None
        self.silent = self.wrong_bytes = self.whole = False
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.salt = ""
        self.salts: list[str] = []
        self.missing: set[str] = set()
        self.odd_keys: list[str] = []
        self.spans: list[Span] = []
        self._closing = asyncio.Event()

    async def __aenter__(self) -> FaultyS3:
        await self.start()
        return self

    async def close(self) -> None:
        self._closing.set()
        await super().close()

    def find(self, bucket: str, key: str) -> StoredObject | None:
        if key in self.odd_keys:
            return StoredObject(key, 1, '"odd"')
        found = None if key in self.missing else super().find(bucket, key)
        return found and found._replace(etag=f'"{found.etag[1:-1]}{self.salt}"')

    def keys(self, bucket: str) -> Iterable[str]:
        return [*(key for key in super().keys(bucket) if key not in self.missing), *self.odd_keys]

    def range_of(self, request: web.Request) -> str:
        return "" if self.whole else super().range_of(request)

    async def instead(self, bucket: str, key: str) -> web.Response | None:
        if self.silent:
            await self._closing.wait()
        if self.error is not None or (key and self.errors):
            status, code = self.error or self.errors.pop(0)
            return failure(status, code, f"{code} for AKIAEXAMPLE")
        if key and self.salts:
            self.salt = self.salts.pop(0)
        return None

    async def send(self, transport: asyncio.Transport, file: BinaryIO, span: Span) -> None:
        self.spans.append(span)
        bounds = [bound for bound in (self.cut_after, self.stall_after) if bound is not None]
        part = Span(span.offset, min([span.size_bytes, *bounds]))
        if self.wrong_bytes:
            file.seek(part.offset)
            transport.write(bytes(byte ^ 0xFF for byte in file.read(part.size_bytes)))
            self.sent_bytes += part.size_bytes
        else:
            await super().send(transport, file, part)
        if part.size_bytes < span.size_bytes:
            if self.stall_after is not None:
                await self._closing.wait()
            transport.close()


@contextlib.contextmanager
def running_moto() -> Iterator[str]:
    """The URL of moto's server, answering; it ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"moto's server did not start (status {process.poll()})")
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/moto-api/", timeout=1.0):
            return True
    except (urllib.error.URLError, OSError):
        return False
