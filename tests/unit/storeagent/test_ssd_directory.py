import errno
import hashlib
import os
import threading
from pathlib import Path

import msgspec
import pytest

from stoker_checkpoint import digests as digests_module
from stoker_checkpoint.digests import ChunkDigests, chunk_digest
from stoker_core.errors import (
    CorruptCheckpoint,
    RefusedCheckpoint,
    StokerError,
    Stopping,
    StorageFailed,
    TierFull,
)
from stoker_core.ids import SequentialIds
from stoker_db.ports import ModelFile
from stoker_storeagent.adapters.ssd import MANIFEST, SsdDirectory, StoredFile, StoredModel

CONTENT = bytes(range(256)) * 40
FILE = ModelFile(path="w", size_bytes=len(CONTENT))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "w").write_bytes(CONTENT)
    return tmp_path / "source"


@pytest.fixture
def ssd(tmp_path: Path) -> SsdDirectory:
    made = SsdDirectory(tmp_path / "ssd", SequentialIds())
    assert made.open() == []
    return made


def copy(ssd: SsdDirectory, source: Path, target: Path, file: ModelFile = FILE, cancelled: bool = False) -> StoredFile:
    event = threading.Event()
    if cancelled:
        event.set()
    return ssd.copy(source, target, file, chunk_bytes=4096, cancelled=event, on_bytes=lambda _: None)


def publish(ssd: SsdDirectory, source: Path, model_id: str = "model-1") -> Path:
    target = ssd.begin(model_id, [FILE])
    return ssd.publish(target, StoredModel(model_id=model_id, name="m", files=(copy(ssd, source, target),)))


def test_a_copy_is_the_source_and_what_is_known_of_it(ssd: SsdDirectory, source: Path) -> None:
    target = ssd.begin("model-1", [FILE])
    done: list[int] = []
    stored = ssd.copy(source, target, FILE, chunk_bytes=4096, cancelled=threading.Event(), on_bytes=done.append)
    assert (target / "w").read_bytes() == CONTENT
    assert stored.digest == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert stored.chunk_digests == (chunk_digest(CONTENT),)
    assert stored.mtime_ns == (target / "w").stat().st_mtime_ns
    assert done == [4096, 8192, len(CONTENT)]


def test_a_published_model_is_found_again_by_the_next_start(ssd: SsdDirectory, source: Path) -> None:
    path = publish(ssd, source)
    assert sorted(entry.name for entry in path.iterdir()) == [MANIFEST, "w"]
    [(stored, _)] = SsdDirectory(ssd.root, SequentialIds()).open()
    assert stored.model_id == "model-1"
    assert stored.total_bytes == len(CONTENT)


def test_what_a_crash_left_is_removed_and_the_rest_adopted(ssd: SsdDirectory, source: Path) -> None:
    publish(ssd, source)
    leftover = ssd.begin("model-2", [FILE])
    aside = publish(ssd, source, "model-3").rename(ssd.root / ".tmp-model-3-x")
    found = ssd.open()
    assert [stored.model_id for stored, _ in found] == ["model-1"]
    assert not leftover.exists()
    assert not aside.exists()


@pytest.mark.parametrize("damage", ["short", "missing", "link"])
def test_a_copy_that_lost_bytes_is_not_adopted(ssd: SsdDirectory, source: Path, damage: str) -> None:
    path = publish(ssd, source)
    if damage == "short":
        os.truncate(path / "w", 10)
    else:
        (path / "w").unlink()
    if damage == "link":
        (path / "w").symlink_to(source / "w")
    assert ssd.open() == []
    assert not path.exists()


def test_what_the_tier_did_not_write_is_left_alone(ssd: SsdDirectory) -> None:
    (ssd.root / "photos").mkdir()
    (ssd.root / "photos" / "1.jpg").write_bytes(b"x")
    (ssd.root / "notes.txt").write_text("x")
    (ssd.root / "other").mkdir()
    (ssd.root / "other" / MANIFEST).write_bytes(
        msgspec.json.encode(StoredModel(model_id="model-9", name="m", files=()))
    )
    (ssd.root / "broken").mkdir()
    (ssd.root / "broken" / MANIFEST).write_text("{")
    assert ssd.open() == []
    assert sorted(path.name for path in ssd.root.iterdir()) == ["broken", "notes.txt", "other", "photos"]


@pytest.mark.parametrize(("size", "reason"), [(len(CONTENT) + 1, "bytes instead of"), (len(CONTENT) - 1, "more than")])
def test_a_source_of_another_size_is_corrupt(ssd: SsdDirectory, source: Path, size: int, reason: str) -> None:
    file = ModelFile(path="w", size_bytes=size)
    with pytest.raises(CorruptCheckpoint, match=reason):
        copy(ssd, source, ssd.begin("model-1", [file]), file)


def test_a_source_that_is_gone_is_refused(ssd: SsdDirectory, source: Path) -> None:
    target = ssd.begin("model-1", [FILE])
    (source / "w").unlink()
    with pytest.raises(RefusedCheckpoint, match="No such file"):
        copy(ssd, source, target)


def test_a_source_that_became_a_link_to_elsewhere_is_refused(ssd: SsdDirectory, source: Path) -> None:
    target = ssd.begin("model-1", [FILE])
    (source / "w").rename(source.parent / "elsewhere")
    (source / "w").symlink_to(source.parent / "elsewhere")
    with pytest.raises(RefusedCheckpoint, match="leaves the model's directory"):
        copy(ssd, source, target)


def test_a_cancelled_copy_stops(ssd: SsdDirectory, source: Path) -> None:
    with pytest.raises(Stopping):
        copy(ssd, source, ssd.begin("model-1", [FILE]), cancelled=True)


@pytest.mark.parametrize("path", ["../w", "/w", "a/w", MANIFEST])
def test_a_file_name_that_leaves_the_copy_is_refused_and_nothing_stays(ssd: SsdDirectory, path: str) -> None:
    with pytest.raises(RefusedCheckpoint):
        ssd.begin("model-1", [FILE, ModelFile(path=path, size_bytes=1)])
    assert list(ssd.root.iterdir()) == []


@pytest.mark.parametrize("model_id", ["..", "a/b", "", ".tmp-x", "A"])
def test_a_model_id_that_is_no_name_is_refused(ssd: SsdDirectory, model_id: str) -> None:
    with pytest.raises(RefusedCheckpoint):
        ssd.begin(model_id, [])


def test_publishing_over_an_unknown_directory_replaces_it(ssd: SsdDirectory, source: Path) -> None:
    publish(ssd, source)
    assert (publish(ssd, source) / "w").read_bytes() == CONTENT
    assert [path.name for path in ssd.root.iterdir()] == ["model-1"]


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, TierFull), (errno.EDQUOT, TierFull), (errno.EIO, StorageFailed)]
)
def test_a_disk_without_room_shows_before_anything_is_copied(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StokerError]
) -> None:
    def fail(descriptor: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(error):
        ssd.begin("model-1", [FILE])
    assert list(ssd.root.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        SsdDirectory(tmp_path / "file" / "ssd", SequentialIds()).open()


@pytest.mark.parametrize("piece_bytes", [1, 7, 10, 64])
@pytest.mark.parametrize("size_bytes", [0, 1, 9, 10, 11, 30])
def test_digests_of_chunks_do_not_depend_on_how_the_bytes_come(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, size_bytes: int
) -> None:
    monkeypatch.setattr(digests_module, "CHUNK_BYTES", 10)
    content = memoryview(CONTENT)[:size_bytes]
    digests = ChunkDigests()
    for at in range(0, size_bytes, piece_bytes):
        digests.update(content[at : at + piece_bytes])
    assert digests.finish() == tuple(chunk_digest(content[at : at + 10]) for at in range(0, size_bytes, 10))


def test_a_copy_of_the_first_format_is_adopted_without_digests_of_chunks(ssd: SsdDirectory, source: Path) -> None:
    path = publish(ssd, source)
    old = {"model_id": "model-1", "name": "m", "format": 1}
    old["files"] = [{"path": "w", "size_bytes": len(CONTENT), "digest": "sha256:00"}]
    (path / MANIFEST).write_bytes(msgspec.json.encode(old))
    [(stored, _)] = ssd.open()
    assert ssd.stored("model-1") == stored
    assert [(file.mtime_ns, file.chunk_digests) for file in stored.files] == [(-1, ())]


def test_a_copy_whose_record_is_lost_is_corrupt(ssd: SsdDirectory, source: Path) -> None:
    (publish(ssd, source) / MANIFEST).unlink()
    with pytest.raises(CorruptCheckpoint, match=MANIFEST):
        ssd.stored("model-1")
