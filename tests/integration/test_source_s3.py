"""Models in S3, against moto's server and against one that fails on command."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from tests.support.checkpoints import pattern
from tests.support.s3_server import FaultyS3, running_moto
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint import layout
from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.directory import inspect_directory
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    InvalidSettings,
    RefusedCheckpoint,
    SourceDenied,
    SourceUnavailable,
    StokerError,
)
from stoker_storeagent.ports import Inspected
from stoker_storeagent.sources import s3
from stoker_storeagent.sources.s3 import S3Settings, S3Source

SECRET = "wJalrXUtnFEMI-EXAMPLEKEY"
URL = "s3://models/team/tiny"
SHARD = "model-00001-of-00002.safetensors"
FIVE_MIB = 5 * 2**20
"""The least that a part of a multi-part upload has."""


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    with running_moto() as url:
        yield url


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where FaultyS3 has it."""
    return write_tiny_model(tmp_path / "s3" / "models" / "team" / "tiny", shards=2)


@pytest.fixture
async def server(model: Path) -> AsyncIterator[FaultyS3]:
    async with FaultyS3(model.parents[2]) as running:
        yield running


@pytest.fixture
async def source(server: FaultyS3) -> AsyncIterator[S3Source]:
    opened = S3Source(S3Settings(endpoint_url=server.url, stall_s=0.5, connect_s=0.5))
    yield opened
    await opened.close()


def bucket_of(moto_url: str, model: Path) -> Any:
    client = boto3.client("s3", endpoint_url=moto_url, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    for path in model.iterdir():
        client.upload_file(str(path), "models", f"team/tiny/{path.name}")
    return client


def same_model(found: Inspected, model: Path) -> bool:
    expected = inspect_directory(model)
    return (
        [(shard.name, shard.size_bytes, shard.tensors) for shard in found.manifest.shards]
        == [(shard.name, shard.size_bytes, shard.tensors) for shard in expected.manifest.shards]
        and found.config == expected.config
        and found.small_files == expected.small_files
    )


class Read:
    """One read of a shard, from `offset` on, into memory of its own."""

    def __init__(self, size: int, offset: int = 0, *, shard: str = SHARD, version: str = "") -> None:
        self.size, self.offset, self.shard, self.version = size, offset, shard, version
        self.into = bytearray(size)
        self.done: list[int] = []

    async def of(self, source: S3Source, url: str = URL) -> bytes:
        await source.read(url, self.shard, self.version, self.offset, memoryview(self.into), self.done.append)
        return bytes(self.into)


async def test_a_model_in_moto_is_inspected_and_read(moto_url: str, model: Path) -> None:
    client = bucket_of(moto_url, model)
    client.put_object(Bucket="models", Key="team/tiny/deeper/model.safetensors", Body=b"not part of it")
    client.put_object(Bucket="models", Key="team/tiny2/config.json", Body=b"{}")
    source = S3Source(S3Settings(endpoint_url=moto_url))
    try:
        found = await source.inspect(f"{URL}/")
        assert found.source == URL
        assert same_model(found, model)
        content = (model / SHARD).read_bytes()
        read = Read(len(content), version=found.versions[SHARD])
        assert await read.of(source) == content
        assert await Read(1000, 99, version=found.versions[SHARD]).of(source) == content[99:1099]
        client.put_object(Bucket="models", Key=f"team/tiny/{SHARD}", Body=content[::-1])
        with pytest.raises(CheckpointChanged, match=SHARD):
            await read.of(source)
        with pytest.raises(RefusedCheckpoint, match="NoSuchKey"):
            await Read(1, shard="gone.safetensors").of(source)
        with pytest.raises(RefusedCheckpoint, match="NoSuchBucket"):
            await source.inspect("s3://nowhere/x")
        with pytest.raises(RefusedCheckpoint, match="nothing is stored under it"):
            await source.inspect("s3://models/team/nothing")
    finally:
        await source.close()


async def test_an_object_of_several_parts_is_read_by_its_version(moto_url: str) -> None:
    client = boto3.client("s3", endpoint_url=moto_url, region_name="us-east-1")
    client.create_bucket(Bucket="parts")
    content = pattern(FIVE_MIB + 1000, 3)
    upload = client.create_multipart_upload(Bucket="parts", Key="m/a.safetensors")["UploadId"]
    parts = [
        {
            "PartNumber": number,
            "ETag": client.upload_part(
                Bucket="parts", Key="m/a.safetensors", UploadId=upload, PartNumber=number, Body=body
            )["ETag"],
        }
        for number, body in ((1, content[:FIVE_MIB]), (2, content[FIVE_MIB:]))
    ]
    version = client.complete_multipart_upload(
        Bucket="parts", Key="m/a.safetensors", UploadId=upload, MultipartUpload={"Parts": parts}
    )["ETag"].strip('"')
    assert version.endswith("-2")
    source = S3Source(S3Settings(endpoint_url=moto_url))
    try:
        read = Read(5000, FIVE_MIB - 4000, shard="a.safetensors", version=version)
        assert await read.of(source, "s3://parts/m") == content[FIVE_MIB - 4000 :]
    finally:
        await source.close()


async def test_inspecting_reads_headers_and_small_files_but_no_weights(
    server: FaultyS3, source: S3Source, model: Path
) -> None:
    found = await source.inspect(URL)
    assert same_model(found, model)
    small_bytes = sum(map(len, found.small_files.values()))
    assert server.sent_bytes == small_bytes + 2 * s3.HEAD_BYTES < small_bytes + found.manifest.file_bytes
    assert set(found.versions) == {shard.name for shard in found.manifest.shards}


async def test_a_header_that_is_longer_than_the_first_look_is_read_on(
    server: FaultyS3, source: S3Source, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "HEAD_BYTES", 100)
    assert same_model(await source.inspect(URL), model)
    assert [span.offset for span in server.spans if span.offset] == [100, 100]


async def test_a_long_listing_is_followed_to_its_end(
    source: S3Source, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2100):
        (model / f"a{number}.txt").touch()
    assert same_model(await source.inspect(URL), model)
    monkeypatch.setattr(layout, "ENTRIES_MAX", 1500)
    with pytest.raises(RefusedCheckpoint, match="more than 1500 entries"):
        await source.inspect(URL)


async def test_keys_that_are_no_file_names_are_never_used(server: FaultyS3, source: S3Source, model: Path) -> None:
    folder = "team/tiny/"
    server.odd_keys = [folder, folder + "..", folder + "../x.model", folder + ".x.model", folder + "x" * 300 + ".model"]
    assert same_model(await source.inspect(URL), model)
    for shard in ("../tiny/config.json", "a/b", "..", ""):
        with pytest.raises(RefusedCheckpoint, match="no plain file name"):
            await Read(1, shard=shard).of(source)


async def test_what_a_local_directory_is_refused_for_a_prefix_is_too(source: S3Source, model: Path) -> None:
    (model / "modeling_x.py").write_text("")
    with pytest.raises(RefusedCheckpoint, match=f"{URL}/modeling_x.py: the directory holds custom code"):
        await source.inspect(URL)
    (model / "modeling_x.py").unlink()
    broken = model / SHARD
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"{URL}/{SHARD}"):
        await source.inspect(URL)
    broken.write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match="0 bytes are too few"):
        await source.inspect(URL)
    broken.unlink()
    with pytest.raises(RefusedCheckpoint, match="1 of 2 shards are missing"):
        await source.inspect(URL)


async def test_small_files_are_bounded_before_they_are_fetched(
    server: FaultyS3, source: S3Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SMALL_FILES_BYTES_MAX", 1000)
    with pytest.raises(RefusedCheckpoint, match="exceed 1000 bytes"):
        await source.inspect(URL)
    assert server.sent_bytes == 0


async def test_progress_is_told_and_a_broken_read_goes_on_where_it_ended(
    server: FaultyS3, source: S3Source, model: Path
) -> None:
    content = (model / SHARD).read_bytes()
    server.cut_after = 70_000
    broken = Read(len(content))
    with pytest.raises(SourceUnavailable, match=SHARD):
        await broken.of(source)
    assert broken.done == sorted(broken.done)
    assert broken.done[-1] <= 70_000
    assert bytes(broken.into[: broken.done[-1]]) == content[: broken.done[-1]]
    server.cut_after = None
    rest = Read(len(content) - broken.done[-1], broken.done[-1])
    assert bytes(broken.into[: broken.done[-1]]) + await rest.of(source) == content
    assert rest.done[-1] == rest.size


DENIED = [
    (403, "AccessDenied"),
    (403, "InvalidAccessKeyId"),
    (403, "SignatureDoesNotMatch"),
    (400, "ExpiredToken"),
    (401, "Unauthorized"),
]
LATER = [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests"), (400, "RequestTimeout"), (502, "<html>")]
GONE = [(404, "NoSuchKey"), (404, "NoSuchBucket"), (400, "InvalidBucketName")]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        *((answer, SourceDenied) for answer in DENIED),
        *((answer, SourceUnavailable) for answer in LATER),
        *((answer, RefusedCheckpoint) for answer in GONE),
        ((412, "PreconditionFailed"), CheckpointChanged),
        ((416, "InvalidRange"), CheckpointChanged),
    ],
)
async def test_an_error_of_the_server_becomes_one_of_ours(
    server: FaultyS3, source: S3Source, answer: tuple[int, str], error: type[StokerError]
) -> None:
    server.error = answer
    with pytest.raises(error) as read:
        await Read(1000).of(source)
    assert type(read.value) is error
    assert f"models/team/tiny/{SHARD}" in read.value.message
    assert "AKIA" not in read.value.message  # the server's own text is not passed on
    with pytest.raises(error):
        await source.inspect(URL)
    assert server.requests == 2  # it is the caller who tries again


async def test_after_an_error_the_next_read_succeeds(server: FaultyS3, source: S3Source, model: Path) -> None:
    server.errors = [(503, "SlowDown"), (500, "InternalError")]
    for _ in range(2):
        with pytest.raises(SourceUnavailable):
            await Read(1000).of(source)
    assert await Read(1000).of(source) == (model / SHARD).read_bytes()[:1000]


@pytest.mark.parametrize("stall_after", [0, 50_000])
async def test_a_server_that_sends_nothing_more_is_given_up(
    server: FaultyS3, source: S3Source, stall_after: int
) -> None:
    server.stall_after = stall_after
    with pytest.raises(SourceUnavailable, match="in time"):
        await Read(100_000).of(source)


async def test_a_server_that_never_answers_is_given_up(server: FaultyS3, source: S3Source) -> None:
    server.silent = True
    for attempt in (Read(1000).of(source), source.inspect(URL)):
        with pytest.raises(SourceUnavailable, match="in time"):
            await attempt


async def test_a_slow_server_is_waited_for_as_long_as_it_sends(server: FaultyS3, source: S3Source, model: Path) -> None:
    (model / "slow.safetensors").write_bytes(pattern(2**20, 0))
    server.bytes_per_s = 2**20  # four pieces, each quicker than the bound; all together slower
    began_s = time.monotonic()
    assert await Read(2**20, shard="slow.safetensors").of(source) == pattern(2**20, 0)
    assert time.monotonic() - began_s > 0.7


async def test_nobody_listening_is_unavailable(server: FaultyS3, source: S3Source) -> None:
    await server.close()
    with pytest.raises(SourceUnavailable, match="EndpointConnectionError"):
        await Read(1000).of(source)


async def test_wrong_bytes_are_for_their_digest_to_tell(server: FaultyS3, source: S3Source, model: Path) -> None:
    server.wrong_bytes = True
    content = (model / SHARD).read_bytes()
    assert chunk_digest(await Read(len(content)).of(source)) != chunk_digest(content)


async def test_an_object_that_changes_between_two_reads_is_noticed(server: FaultyS3, source: S3Source) -> None:
    version = (await source.inspect(URL)).versions[SHARD]
    server.salts = ["", "other"]
    await Read(1000, version=version).of(source)
    with pytest.raises(CheckpointChanged, match="not the version"):
        await Read(1000, 1000, version=version).of(source)


async def test_an_object_that_changes_while_it_is_inspected_is_noticed(server: FaultyS3, source: S3Source) -> None:
    server.salts = ["", "", "other"]
    with pytest.raises(CheckpointChanged, match="not the version"):
        await source.inspect(URL)


async def test_an_object_that_is_gone_is_refused(server: FaultyS3, source: S3Source) -> None:
    server.missing = {f"team/tiny/{SHARD}"}
    with pytest.raises(RefusedCheckpoint, match="it is not there"):
        await Read(1000).of(source)
    with pytest.raises(RefusedCheckpoint, match="1 of 2 shards are missing"):
        await source.inspect(URL)


async def test_an_object_that_is_too_short_has_changed(source: S3Source, model: Path) -> None:
    size = (model / SHARD).stat().st_size
    for read in (Read(1000, size - 500), Read(1000, size)):
        with pytest.raises(CheckpointChanged, match=r"ends at|shorter than"):
            await read.of(source)


async def test_a_server_that_knows_no_ranges_is_not_believed(server: FaultyS3, source: S3Source, model: Path) -> None:
    server.whole = True
    content = (model / SHARD).read_bytes()
    assert await Read(len(content)).of(source) == content  # all of it is what was asked for
    for read in (Read(1000), Read(1000, 500)):
        with pytest.raises(SourceUnavailable, match="instead of"):
            await read.of(source)


async def test_a_read_that_is_cancelled_leaves_the_source_usable(
    server: FaultyS3, source: S3Source, model: Path
) -> None:
    server.stall_after = 1000
    read = Read(2000)
    waiting = asyncio.create_task(read.of(source))
    while not read.done:
        await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    server.stall_after = None
    assert await Read(2000).of(source) == (model / SHARD).read_bytes()[:2000]


async def test_more_reads_than_connections_all_come_to_their_turn(server: FaultyS3, model: Path) -> None:
    source = S3Source(S3Settings(endpoint_url=server.url, connections=2, connect_s=0.5, stall_s=0.5))
    try:
        content = (model / SHARD).read_bytes()
        reads = [Read(10_000, offset) for offset in range(0, 100_000, 10_000)]
        found = await asyncio.gather(*(read.of(source) for read in reads))
        assert b"".join(found) == content[:100_000]
    finally:
        await source.close()


async def test_without_credentials_access_is_denied_within_seconds_and_had_once_there_are_some(
    server: FaultyS3, source: S3Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(SourceDenied, match="no credentials"):
        await source.inspect(URL)
    assert server.requests == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    await source.inspect(URL)


async def test_anonymous_needs_no_credentials(server: FaultyS3, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    source = S3Source(S3Settings(endpoint_url=server.url, anonymous=True))
    try:
        assert same_model(await source.inspect(URL), model)
    finally:
        await source.close()


async def test_the_endpoint_may_come_from_the_environment(
    server: FaultyS3, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    source = S3Source(S3Settings())
    try:
        assert same_model(await source.inspect(URL), model)
    finally:
        await source.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
    with pytest.raises(InvalidSettings, match="AWS_ENDPOINT_URL"):
        await source.inspect(URL)


async def test_a_profile_that_does_not_exist_gives_no_access(source: S3Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(SourceDenied, match="ProfileNotFound"):
        await source.inspect(URL)


@pytest.mark.parametrize("url", ["127.0.0.1:9000", "s3://x", "http://user:secret@host", "https://host/?x=secret"])
def test_an_endpoint_that_is_none_is_an_invalid_setting(url: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        S3Source(S3Settings(endpoint_url=url))
    assert "secret" not in refused.value.message


async def test_no_error_shows_what_a_request_was_signed_with(server: FaultyS3, source: S3Source) -> None:
    messages = []
    for status, code in (*DENIED, *LATER, *GONE, (400, f"{SECRET}/")):
        server.error = (status, code)
        with pytest.raises(StokerError) as failed:
            await Read(1000).of(source)
        messages.append(str(failed.value))
    assert not [message for message in messages if SECRET in message or "Signature=" in message or "AKIA" in message]


async def test_who_has_no_model_in_s3_does_not_import_what_it_needs() -> None:
    code = """
import sys
import stoker_storeagent.sources.s3
assert not {"aioboto3", "botocore"} & sys.modules.keys()
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0


async def test_the_server_of_the_benchmark_ends_with_who_started_it(model: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stoker_cli.bench.s3_server", str(model.parents[2])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        url = json.loads(await process.stdout.readline())["url"]
        source = S3Source(S3Settings(endpoint_url=url))
        assert same_model(await source.inspect(URL), model)
        await source.close()
        process.stdin.close()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
