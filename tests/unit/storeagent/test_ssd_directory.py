"""What the SSD tier's directory keeps, and what a start makes of what it finds."""

import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from tests.support.ssd_rig import FILES, SHARDS, SIZES, a_checkpoint, a_directory, content, digest_of, opened, put

from stoker_checkpoint.leased import MANIFEST, read_manifest
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_core.errors import RefusedCheckpoint, StokerError, StorageFailed, TierFull
from stoker_storeagent.adapters.ssd import SsdDirectory
from stoker_storeagent.adapters.ssd_files import LEARNT, RECORD
from stoker_storeagent.ports import DiskContents
from stoker_storeagent.records import Checkpoint

MODEL = "model-1"


@pytest.fixture
async def ssd(tmp_path: Path) -> AsyncIterator[SsdDirectory]:
    async with opened(tmp_path) as made:
        yield made


async def contents(root: Path) -> DiskContents:
    """As a start finds them."""
    with a_directory(root) as ssd:
        return await ssd.open()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def test_a_new_directory_is_this_users_alone_and_empty(tmp_path: Path) -> None:
    found = await contents(tmp_path / "a" / "ssd")
    assert found == DiskContents(checkpoints=(), used_s={}, chunks={}, learnt={})
    for path in (tmp_path / "a" / "ssd", *(tmp_path / "a" / "ssd").iterdir()):
        assert path.stat().st_mode & 0o077 == 0


async def test_a_directory_that_cannot_be_made_is_a_storage_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed):
        await contents(tmp_path / "file" / "ssd")


async def test_a_start_finds_what_was_kept(ssd: SsdDirectory) -> None:
    checkpoints = (a_checkpoint("model-1", bound=True), a_checkpoint("model-2"))
    for checkpoint in checkpoints:
        await ssd.keep(checkpoint, FILES)
    for number, model_id in enumerate(("model-2", "model-1")):
        os.utime(ssd.folder(model_id) / RECORD, (number, number + 0.5))
    chunks = {await put(ssd, MODEL, position): SIZES[position] for position in range(3)}
    await ssd.learn("model-2", 1, digest_of(1))
    found = await contents(ssd.root)
    assert found.checkpoints == checkpoints[::-1]  # by use
    assert found.used_s == {"model-2": 0.5, "model-1": 1.5}
    assert found.chunks == chunks
    assert found.learnt == {"model-2": {1: digest_of(1)}}


async def test_the_folder_has_the_small_files_and_the_manifest(ssd: SsdDirectory) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    folder = ssd.folder(MODEL)
    assert names(folder) == sorted([*FILES, *SHARDS, MANIFEST, RECORD])
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert read_manifest(folder) == a_checkpoint().manifest


async def test_binding_digests_replaces_the_manifest_and_ends_what_was_learnt(ssd: SsdDirectory) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    await put(ssd, MODEL, 1)
    await ssd.learn(MODEL, 1, digest_of(1))
    await ssd.keep(a_checkpoint(), FILES)
    assert (await contents(ssd.root)).learnt == {MODEL: {1: digest_of(1)}}
    unchanged = (ssd.folder(MODEL) / "config.json").stat()
    await ssd.keep(a_checkpoint(bound=True), FILES)
    assert names(ssd.folder(MODEL)) == sorted([*FILES, *SHARDS, MANIFEST, RECORD])
    assert (ssd.folder(MODEL) / "config.json").stat() == unchanged
    found = await contents(ssd.root)
    assert found.checkpoints == (a_checkpoint(bound=True),)
    assert found.learnt == {}


async def test_other_small_files_take_the_place_of_those_that_were_kept(ssd: SsdDirectory) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    other = {"config.json": b"{}", "vocab.txt": b"a b"}
    checkpoint = msgspec.structs.replace(a_checkpoint(), small_bytes=5, name="n")
    await ssd.keep(checkpoint, other)
    assert {name: (ssd.folder(MODEL) / name).read_bytes() for name in other} == other
    assert names(ssd.folder(MODEL)) == sorted([*other, *SHARDS, MANIFEST, RECORD])
    assert (await contents(ssd.root)).checkpoints == (checkpoint,)


@pytest.mark.parametrize("name", ["../w", "/w", "a/w", "", ".hidden", MANIFEST, RECORD, LEARNT])
async def test_a_file_name_that_is_not_plain_or_ours_is_refused(ssd: SsdDirectory, name: str) -> None:
    with pytest.raises(RefusedCheckpoint, match="no plain file name"):
        await ssd.keep(a_checkpoint(), {"config.json": b"{}", name: b""})
    assert names(ssd.root / "models") == []


@pytest.mark.parametrize("model_id", ["..", "a/b", "", ".tmp-x", "A"])
async def test_a_model_id_that_is_no_name_is_refused(ssd: SsdDirectory, model_id: str) -> None:
    with pytest.raises(RefusedCheckpoint, match="no model id"):
        await ssd.keep(a_checkpoint(model_id), FILES)
    with pytest.raises(RefusedCheckpoint, match="no model id"):
        await ssd.part(model_id, 0)
    with pytest.raises(RefusedCheckpoint, match="no model id"):
        await ssd.forget(model_id)


class Killed(BaseException):
    """As if the process ended there: nothing that is cleaned up on errors is."""


Step = Callable[[], None]


def at_each_step(patch: pytest.MonkeyPatch, step: Step) -> None:
    """Call `step` before every operation that changes what another process sees."""
    sync, rename, unlink, rmtree = os.fsync, Path.rename, Path.unlink, shutil.rmtree

    def fsync(descriptor: int) -> None:
        step()
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        step()
        return rename(path, target)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        step()
        unlink(path, missing_ok=missing_ok)

    def removed(path: Path, ignore_errors: bool = False) -> None:
        step()
        rmtree(path, ignore_errors)

    patch.setattr(os, "fsync", fsync)
    patch.setattr(shutil, "rmtree", removed)
    patch.setattr(Path, "rename", renamed)
    patch.setattr(Path, "unlink", unlinked)


def dies_at(number: int) -> Step:
    left = [number]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:  # and at each later one: the dead do nothing more
            raise Killed

    return step


@pytest.mark.parametrize("before", [None, a_checkpoint(), a_checkpoint(bound=True)])
async def test_whenever_a_keep_is_cut_short_a_start_finds_the_old_model_or_the_new_one(
    tmp_path: Path, before: Checkpoint | None
) -> None:
    finished = False
    for number in range(40):
        root = tmp_path / str(number)
        async with opened(root) as ssd:
            if before is not None:
                await ssd.keep(before, FILES)
            after = a_checkpoint(bound=before is None or not before.bound)
            try:
                with pytest.MonkeyPatch.context() as patch:
                    at_each_step(patch, dies_at(number))
                    await ssd.keep(after, FILES)
                finished = True
            except Killed:
                pass
        found = (await contents(root)).checkpoints
        assert found in ((after,), (before,) if before is not None else ())
        assert [path.name for path in root.iterdir() if path.name.startswith(".tmp-")] == []
        if finished:
            assert found == (after,)
            break
    assert finished


async def test_whenever_forgetting_is_cut_short_a_start_finds_a_whole_model_or_none(tmp_path: Path) -> None:
    found = []
    for number in range(8):
        root = tmp_path / str(number)
        async with opened(root) as ssd:
            await ssd.keep(a_checkpoint(), FILES)
            (await ssd.part(MODEL, 0)).close()
            with pytest.MonkeyPatch.context() as patch, suppress(Killed):
                at_each_step(patch, dies_at(number))
                await ssd.forget(MODEL)
        found.append(len((await contents(root)).checkpoints))
        assert names(root) == ["chunks", "models", "parts"]
        assert found[-1] or names(root / "parts") == ["BOOT"]
    assert found == [1] + [0] * 7


async def test_who_has_a_folders_path_finds_all_its_files_at_every_moment(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    folder, seen = ssd.folder(MODEL), []

    def look() -> None:
        found = tuple((folder / name).read_bytes() for name in FILES)
        assert found[0] in (FILES["config.json"], b"new")
        assert found[1] == FILES["tokenizer.json"]
        seen.append((found[0], read_manifest(folder)))

    at_each_step(monkeypatch, look)
    await ssd.keep(a_checkpoint(bound=True), FILES | {"config.json": b"new"})
    assert seen[-1] == (b"new", a_checkpoint(bound=True).manifest)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, TierFull), (errno.EDQUOT, TierFull), (errno.EIO, StorageFailed)]
)
async def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, number: int, error: type[StokerError]
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(error):
        await ssd.keep(a_checkpoint(), FILES)
    assert names(ssd.root) == ["chunks", "models", "parts"]
    assert names(ssd.root / "models") == []


async def test_a_forgotten_model_leaves_its_chunks(ssd: SsdDirectory) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    digest = await put(ssd, MODEL, 1)
    part = await ssd.part(MODEL, 2)
    part.close()
    for _ in range(2):
        await ssd.forget(MODEL)
        assert names(ssd.root) == ["chunks", "models", "parts"]
        assert (names(ssd.root / "models"), names(ssd.root / "parts")) == ([], ["BOOT"])
    assert (await contents(ssd.root)).chunks == {digest: SIZES[1]}


async def test_use_is_remembered(ssd: SsdDirectory) -> None:
    await ssd.keep(a_checkpoint("model-1"), FILES)
    await ssd.keep(a_checkpoint("model-2"), FILES)
    for model_id in ("model-1", "model-2"):
        os.utime(ssd.folder(model_id) / RECORD, (1, 1))
    await ssd.touch("model-1")
    await ssd.touch("model-3")
    used_s = (await contents(ssd.root)).used_s
    assert used_s["model-2"] == 1
    assert used_s["model-1"] > 1


@pytest.mark.parametrize(
    "torn",
    [
        b"\n1",
        b"\n1 xxh3_128:00",
        b"\n1 " + digest_of(1).encode()[:-1],
        b"\n3 " + digest_of(1).encode(),  # past the last
        b"\n0 " + digest_of(1).encode(),  # of another size
        b"\n2 " + digest_of(2).encode(),  # not there
        b"\n-1 " + digest_of(1).encode(),
        b"\n" + bytes(64),
        b"\n\xff\xfe",
    ],
)
async def test_of_what_was_learnt_only_whole_entries_of_chunks_that_are_there_count(
    ssd: SsdDirectory, torn: bytes
) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    await put(ssd, MODEL, 0)
    await put(ssd, MODEL, 1)
    path = ssd.folder(MODEL) / LEARNT
    await ssd.learn(MODEL, 0, digest_of(0))
    with path.open("ab") as file:
        file.write(torn)
    await ssd.learn(MODEL, 1, digest_of(1))
    for _ in range(2):
        assert (await contents(ssd.root)).learnt == {MODEL: {0: digest_of(0), 1: digest_of(1)}}
        assert path.read_bytes().count(b"\n") == 2


async def test_an_entry_that_was_torn_never_makes_another_of_the_next(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ssd.keep(a_checkpoint(), FILES)
    await put(ssd, MODEL, 1)
    for most in range(2, 40):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda fd, data, write=os.write, most=most: write(fd, data[:most]))
            with pytest.raises(TierFull):
                await ssd.learn(MODEL, 2, digest_of(2))
    await ssd.learn(MODEL, 1, digest_of(1))
    assert (await contents(ssd.root)).learnt == {MODEL: {1: digest_of(1)}}


async def test_learning_of_a_model_that_is_not_kept_fails(ssd: SsdDirectory) -> None:
    with pytest.raises(StorageFailed):
        await ssd.learn(MODEL, 1, digest_of(1))


async def test_a_removed_chunk_is_gone_and_need_not_be_there(ssd: SsdDirectory) -> None:
    digest = await put(ssd, MODEL, 1)
    await ssd.remove(digest)
    await ssd.remove(digest)
    assert not ssd.chunk(digest).exists()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: os.truncate(path, SIZES[0] - 1),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, CHUNK_BYTES + 1),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.unlink(),
    ],
)
async def test_a_chunk_with_other_bytes_is_not_intact(ssd: SsdDirectory, damage: Callable[[Path], object]) -> None:
    digest = await put(ssd, MODEL, 0)
    assert await ssd.intact(digest)
    damage(ssd.chunk(digest))
    assert not await ssd.intact(digest)


async def test_a_chunk_that_cannot_be_read_is_not_intact(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await put(ssd, MODEL, 1)

    def readv(descriptor: int, buffers: list[memoryview]) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "readv", readv)
    assert not await ssd.intact(digest)


async def test_what_is_no_chunk_is_removed_at_a_start(ssd: SsdDirectory, tmp_path: Path) -> None:
    digest = await put(ssd, MODEL, 1)
    chunks = ssd.root / "chunks"
    hex_ = "ab" + "0" * 30
    (chunks / "ab").mkdir(exist_ok=True)
    (chunks / "ab" / hex_).write_bytes(b"")
    (chunks / "ab" / ("ab" + "1" * 30)).write_bytes(bytes(CHUNK_BYTES + 1))
    (chunks / "ab" / ("ab" + "2" * 30)).symlink_to(ssd.chunk(digest))
    (chunks / "ab" / ("ab" + "3" * 30)).mkdir()
    (chunks / "ab" / ("cd" + "0" * 30)).write_bytes(b"x")
    (chunks / "ab" / "short").write_bytes(b"x")
    (chunks / "stray").write_bytes(b"x")
    assert (await contents(ssd.root)).chunks == {digest: SIZES[1]}
    assert names(chunks / "ab") == []
    assert "stray" not in names(chunks)
    assert ssd.chunk(digest).exists()


def _delete(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _rewrite(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def _record(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        record = msgspec.json.decode((folder / RECORD).read_bytes())
        (folder / RECORD).write_bytes(msgspec.json.encode(record | changes))

    return change


@pytest.mark.parametrize(
    "breaks",
    [
        _delete(RECORD),
        _delete(MANIFEST),
        _delete("config.json"),
        _rewrite(RECORD, b"{"),
        _rewrite(MANIFEST, b"\xc1"),
        _rewrite("config.json", b"longer than it was before"),
        _record(format=2),
        _record(model_id="model-2"),
        _record(files={"../../x": 1}),
        _record(versions=None),
        lambda folder: ((folder / RECORD).unlink(), (folder / RECORD).mkdir()),
    ],
)
async def test_a_broken_folder_is_removed_and_others_stay(ssd: SsdDirectory, breaks: Callable[[Path], object]) -> None:
    await ssd.keep(a_checkpoint("model-1"), FILES)
    await ssd.keep(a_checkpoint("model-9"), FILES)
    breaks(ssd.folder("model-1"))
    assert [found.model_id for found in (await contents(ssd.root)).checkpoints] == ["model-9"]
    assert names(ssd.root / "models") == ["model-9"]
    await ssd.keep(a_checkpoint("model-1"), FILES)
    assert len((await contents(ssd.root)).checkpoints) == 2


async def test_a_shortage_of_descriptors_at_a_start_removes_nothing(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ssd.keep(a_checkpoint(), FILES)

    def open_(path: Path, flags: int, mode: int = 0o777, opener: Callable[..., int] = os.open) -> int:
        if str(path).endswith(RECORD):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opener(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        with pytest.raises(StorageFailed):
            await contents(ssd.root)
    assert (await contents(ssd.root)).checkpoints == (a_checkpoint(),)


async def test_leftovers_and_older_formats_are_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for format_ in (1, 2):
        old = tmp_path / f"model-{format_}"
        old.mkdir()
        (old / "stoker.json").write_bytes(
            msgspec.json.encode({"model_id": old.name, "name": "m", "files": [], "format": format_})
        )
        (old / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".tmp-model-1-copy-1").mkdir()
    (tmp_path / ".tmp-file").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "stoker.json").write_bytes(msgspec.json.encode({"model_id": "elsewhere", "format": 2}))
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "stoker.json").write_bytes(msgspec.json.encode({"model_id": "newer", "format": 9}))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "stoker.json").write_text("{")
    assert (await contents(tmp_path)).checkpoints == ()
    assert names(tmp_path) == ["broken", "chunks", "models", "newer", "notes.txt", "other", "parts"]


async def test_calls_leave_the_event_loop_free(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def utime(path: Path, change: Callable[[Path], None] = os.utime) -> None:
        threads.add(threading.current_thread())
        change(path)

    monkeypatch.setattr(os, "utime", utime)
    await ssd.keep(a_checkpoint(), FILES)
    await ssd.touch(MODEL)
    assert threads
    assert threading.main_thread() not in threads
    assert await ssd.free_bytes() > 0


async def test_chunks_no_model_refers_to_are_listed(ssd: SsdDirectory) -> None:
    digest = await put(ssd, MODEL, 2)
    assert (await contents(ssd.root)).chunks == {digest: len(content(SIZES[2]))}
