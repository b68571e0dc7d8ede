"""A client of S3 on aioboto3: its settings, its requests, and its failures as Stoker's errors.

Only this module imports the libraries, so that whoever has no model there does not wait for them. They do not try again by
themselves: who asks knows how long it may take, and goes on where a read broke off.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, NamedTuple

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from botocore import UNSIGNED
from botocore import exceptions as boto

from stoker_core.errors import CheckpointChanged, InvalidSettings, RefusedCheckpoint, SourceDenied, SourceUnavailable
from stoker_storeagent.ports import OnBytes
from stoker_storeagent.sources.s3 import S3Settings
from stoker_storeagent.telling import Telling

PAGES_MAX = 1000
"""Of a listing: a server may send pages that are empty, but not for ever."""
CREDENTIALS_S = 15.0
"""The machine's own metadata service is asked last; where there is none, its time-outs take two seconds."""
_DENIED = frozenset(
    {
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",  # the region is another one
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "PermanentRedirect",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
_LATER = frozenset({"RequestTimeout", "RequestLimitExceeded", "SlowDown", "Throttling", "ThrottlingException"})
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.NoAuthTokenError,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/")


class Page(NamedTuple):
    """objects: (key, bytes, version).  entries: of the page, groups of keys that lie deeper included."""

    objects: list[tuple[str, int, str]]
    entries: int


class S3Session:
    """One client. What it raises names s3://bucket/key and a cause, never what a request was signed with."""

    def __init__(self, client: Any, settings: S3Settings, closing: AsyncExitStack) -> None:
        self._client, self._closing = client, closing
        self._answer_s = settings.connect_s + settings.stall_s
        # The client would let requests wait for a connection, and their time-outs run meanwhile.
        self._free = asyncio.Semaphore(settings.connections)

    @classmethod
    async def open(cls, settings: S3Settings) -> S3Session:
        """Raises SourceDenied without credentials, SourceUnavailable if who gives them does not answer.

        InvalidSettings for an endpoint in the environment that is none.
        """
        closing = AsyncExitStack()
        try:
            with _errors("s3://"):
                session = await asyncio.to_thread(_prepare)
                async with asyncio.timeout(CREDENTIALS_S):
                    if not settings.anonymous and await session.get_credentials() is None:
                        raise boto.NoCredentialsError
                    client = await closing.enter_async_context(session.client("s3", **_options(settings)))
        except ValueError as error:  # the client's word for a URL that is none; ours was checked
            raise InvalidSettings("AWS_ENDPOINT_URL, or the configuration of AWS, names no usable endpoint") from error
        return cls(client, settings, closing)

    async def close(self) -> None:
        await self._closing.aclose()

    async def pages(self, bucket: str, folder: str) -> AsyncIterator[Page]:
        """List what is directly under a folder. Raises RefusedCheckpoint, SourceDenied, SourceUnavailable."""
        where = f"s3://{bucket}/{folder}"
        token: dict[str, str] = {}
        for _ in range(PAGES_MAX):
            with _errors(where):
                async with self._free, asyncio.timeout(self._answer_s):
                    page = await self._client.list_objects_v2(Bucket=bucket, Prefix=folder, Delimiter="/", **token)
            found = page.get("Contents", ())
            yield Page(
                [(one["Key"], int(one["Size"]), _unquoted(one.get("ETag"))) for one in found],
                len(found) + len(page.get("CommonPrefixes", ())),
            )
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page.get("NextContinuationToken", "")}
        raise RefusedCheckpoint(where, f"its listing has more than {PAGES_MAX} pages")

    async def read(self, bucket: str, key: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        """Fill `into`, which is not empty, as `ports.Source.read`. version: an ETag without quotes; empty: any."""
        where, size = f"s3://{bucket}/{key}", len(into)
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={offset}-{offset + size - 1}"}
        if version:
            asked["IfMatch"] = f'"{version}"'
        done = 0
        with _errors(where):
            async with self._free:
                async with asyncio.timeout(self._answer_s):
                    answer = await self._client.get_object(**asked)
                async with answer["Body"] as body:
                    _check(where, answer, version, offset, size)
                    telling = Telling(on_bytes)
                    try:
                        while done < size:  # each wait is bounded by the client's time-out, stall_s
                            piece = await body.content.readany()
                            if not piece or done + len(piece) > size:
                                raise SourceUnavailable(where, f"it sends {done + len(piece)} bytes of {size}")
                            into[done : done + len(piece)] = piece
                            done += len(piece)
                            telling.came(done)
                    finally:
                        telling.end()


def _prepare() -> aioboto3.Session:
    """A session whose client can be made without a wait: what describes S3 is read from the disk here, in a thread."""
    session = aioboto3.Session()

    async def make() -> None:
        # Keys of no use: looking for real ones is not for this thread's event loop.
        options = {"aws_access_key_id": "-", "aws_secret_access_key": "-", "region_name": "us-east-1"}
        async with session.client("s3", **options):
            pass

    asyncio.run(make())
    return session


def _options(settings: S3Settings) -> dict[str, Any]:
    elsewhere = settings.endpoint_url or any(os.environ.get(f"AWS_ENDPOINT_URL{of}") for of in ("_S3", ""))
    config = AioConfig(
        connect_timeout=settings.connect_s,
        read_timeout=settings.stall_s,
        max_pool_connections=settings.connections,
        retries={"total_max_attempts": 1},
        signature_version=UNSIGNED if settings.anonymous else "s3v4",
        # A bucket in the host's name needs DNS for it, which private endpoints rarely have.
        s3={"addressing_style": "path" if elsewhere else "auto"},
        # Chunks have digests of our own, and not everything that speaks S3 knows these checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return {
        "config": config,
        "endpoint_url": settings.endpoint_url or None,
        "region_name": settings.region or None,
    }


def _check(where: str, answer: dict[str, Any], version: str, offset: int, size: int) -> None:
    """Whether an answer is what was asked for. Raises CheckpointChanged, SourceUnavailable."""
    found = _unquoted(answer.get("ETag"))
    if version and found and found != version:
        raise CheckpointChanged(where, "it is not the version that was registered")
    sent = _RANGE.match(answer.get("ContentRange", ""))
    begin, end = (int(sent[1]), int(sent[2]) + 1) if sent else (0, int(answer.get("ContentLength", 0)))
    if begin == offset and end < offset + size:
        raise CheckpointChanged(where, f"it ends at byte {end}, before what was registered does")
    if (begin, end) != (offset, offset + size) or answer.get("ContentLength") != size:
        raise SourceUnavailable(where, f"it sends bytes {begin} to {end} instead of {offset} to {offset + size}")


def _unquoted(etag: str | None) -> str:
    return (etag or "").strip('"')


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Failures of the libraries as errors of Stoker: what they say may hold anything, so only its kind is passed on."""
    try:
        yield
    except boto.ClientError as error:
        raise _of_answer(where, error) from error
    except _NO_CREDENTIALS as error:
        raise SourceDenied(where, f"there are no credentials for it ({type(error).__name__})") from error
    except (TimeoutError, boto.ConnectTimeoutError, boto.ReadTimeoutError) as error:
        raise SourceUnavailable(where, "it does not answer in time") from error
    except (boto.BotoCoreError, boto.HTTPClientError, aiohttp.ClientError, OSError) as error:
        raise SourceUnavailable(where, f"the connection to it failed ({type(error).__name__})") from error


def _of_answer(where: str, error: boto.ClientError) -> RefusedCheckpoint | SourceDenied | SourceUnavailable:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(error.response.get("Error", {}).get("Code", ""))
    if not re.fullmatch(r"[A-Za-z0-9.]{1,64}", code):
        code = "no code"
    said = f"the endpoint answers {status} ({code})"
    if status == 412 or code == "PreconditionFailed":
        return CheckpointChanged(where, "it is not the version that was registered")
    if status == 416 or code == "InvalidRange":
        return CheckpointChanged(where, "it is shorter than what was registered")
    if status >= 500 or status in (408, 429) or code in _LATER:
        return SourceUnavailable(where, said)
    if status in (401, 403) or code in _DENIED:
        return SourceDenied(where, said)
    if status == 404:
        return RefusedCheckpoint(where, f"it is not there ({code})")
    return RefusedCheckpoint(where, said)
