from pathlib import Path

import pytest

from stoker_core.errors import RefusedCheckpoint
from stoker_storeagent.ports import Inspected, OnBytes
from stoker_storeagent.sources import Sources
from stoker_storeagent.sources.urls import file_path, s3_prefix, scheme_of, shown_source


class NamedSource:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.asked: list[str] = []

    async def inspect(self, url: str) -> Inspected:
        raise NotImplementedError

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        self.asked.append(url)


@pytest.mark.parametrize(
    ("source", "scheme"),
    [("/a/b", "file"), ("file:///a", "file"), ("s3://b/p", "s3"), ("S3://b/p", "s3"), ("a/b", ""), ("", "")],
)
def test_a_source_is_picked_by_its_scheme(source: str, scheme: str) -> None:
    assert scheme_of(source) == scheme


async def test_reads_go_to_the_source_of_the_scheme() -> None:
    here, there = NamedSource("file"), NamedSource("s3")
    sources = Sources({"file": here, "s3": there})
    await sources.read("s3://b/p", "s", "", 0, memoryview(bytearray(1)), print)
    await sources.read("/a", "s", "", 0, memoryview(bytearray(1)), print)
    assert (here.asked, there.asked) == (["/a"], ["s3://b/p"])
    assert (sources.kind("/a"), sources.kind("s3://b/p")) == ("file", "s3")


@pytest.mark.parametrize("source", ["http://host/x", "gs://b/p", "relative", "", "ftp:x"])
def test_an_unknown_scheme_is_refused_with_those_that_work(source: str) -> None:
    sources = Sources({"file": NamedSource("file"), "s3": NamedSource("s3")})
    with pytest.raises(RefusedCheckpoint, match="must be file:///absolute/directory or s3://bucket/prefix"):
        sources.of(source)


@pytest.mark.parametrize(
    ("url", "bucket", "folder", "kept"),
    [
        ("s3://models/team/m", "models", "team/m/", "s3://models/team/m"),
        ("s3://models/team/m//", "models", "team/m/", "s3://models/team/m"),
        ("s3://models", "models", "", "s3://models"),
        ("s3://models/", "models", "", "s3://models"),
        ("s3://models/ü %20+", "models", "ü %20+/", "s3://models/ü %20+"),
    ],
)
def test_a_prefix_is_taken_literally_and_kept_in_one_form(url: str, bucket: str, folder: str, kept: str) -> None:
    place = s3_prefix(url)
    assert (place.bucket, place.folder, place.url) == (bucket, folder, kept)
    assert s3_prefix(place.url) == place


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///p", "s3://b", "s3://a b/p", "s3://-a/p", "s3://models/a//b", "s3://models/../x", "s3://models/./x",
     "s3://models/a\0b", "s3://models/a\nb", "s3://models/\udc80", "s3://models/" + "x" * 1025, "s3://models/p?x=1",
     "s3://models/p#x", "s3://key:secret@models/p", "file:///a", "s3://models/" + "x" * 5000],
)  # fmt: skip
def test_what_is_no_prefix_is_refused(url: str) -> None:
    with pytest.raises(RefusedCheckpoint) as refused:
        s3_prefix(url)
    assert "secret" not in refused.value.message
    assert len(refused.value.message) < 400


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/p", "s3://bucket/p"),
        ("https://bucket.host/p?X-Amz-Signature=secret#x", "https://bucket.host/p"),
        ("https://a:secret@b@host", "https://host"),
        ("s3:key:secret@bucket/p", "bucket/p"),
        ("/plain/path?x@y", "/plain/path?x@y"),
        ("s3://b/p@q", "s3://b/p@q"),
    ],
)
def test_a_message_shows_no_part_of_a_url_that_may_give_access(url: str, shown: str) -> None:
    assert shown_source(url) == shown
    with pytest.raises(RefusedCheckpoint) as refused:
        Sources({}).of(url)
    assert "secret" not in refused.value.message


def test_a_file_url_is_decoded_and_a_path_is_not() -> None:
    assert file_path("file:///a%20b") == Path("/a b")
    assert file_path("file://localhost/a") == Path("/a")
    assert file_path("/a%20b") == Path("/a%20b")
