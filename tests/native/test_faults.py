"""What goes wrong with files and disks: a typed error that names file and offset; no hang, no wrong bytes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import assert_same, plain_checkpoint

from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.load import load
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import CheckpointChanged, CorruptCheckpoint, ReadFailed, StokerError

SECOND = "model-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files of 20 MiB: two chunks each."""
    plain_checkpoint(tmp_path, shards=2)
    return tmp_path


def cut(path: Path) -> None:
    os.truncate(path, CHUNK_BYTES + 12_345)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    """One byte of its second chunk; the time of change tells."""
    flip(path)
    os.utime(path, ns=(0, 1))


def flip(path: Path) -> None:
    """The same, but only the contents tell."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(CHUNK_BYTES + 999)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_what_never_ends(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FAULTS: dict[str, tuple[Callable[[Path], None], type[StokerError], str]] = {
    "removed": (Path.unlink, ReadFailed, "No such file"),
    "a directory": (replace_by_directory, ReadFailed, "directory"),
    "a FIFO": (replace_by_fifo, ReadFailed, "Invalid argument"),
    "a device": (replace_by_what_never_ends, ReadFailed, "Invalid argument"),
    "truncated": (cut, CorruptCheckpoint, f"ends at byte {CHUNK_BYTES + 12_345}"),
    "grown": (grow, CheckpointChanged, "size or time"),
    "written to": (overwrite, CheckpointChanged, "size or time"),
    "other contents": (flip, CorruptCheckpoint, f"chunk at byte {CHUNK_BYTES} does not have the digest"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_file_that_is_not_as_registered_ends_the_load_with_its_name(
    pool: Pool, model: Path, fault: str
) -> None:
    spoil, kind, message = FAULTS[fault]
    manifest = digest_manifest(open_checkpoint(model), model)
    spoil(model / SECOND)
    with load(manifest, pool, model, verify=True) as loaded:
        with pytest.raises(kind, match=message) as caught:
            list(loaded.tensors())
        assert getattr(caught.value, "path", None) == str(model / SECOND)
        with pytest.raises(kind, match=message):
            [name async for name, _ in loaded.atensors()]
        with pytest.raises(kind, match=message):
            loaded.touch()
        with pytest.raises(kind, match=message):
            loaded.wait(30)
        with pytest.raises(kind, match=message):
            await loaded.ready()
        with pytest.raises(kind, match=message):
            loaded.tensor("1.7")
    with pool.read(plan_reads(manifest), manifest, model, verify=True) as reading:
        with pytest.raises(kind, match=message):
            await reading.wait()
        with pytest.raises(kind, match=message):
            reading.wait_blocking(30)
        assert not reading.done


def test_a_wrong_chunk_is_never_handed_out(pool: Pool, model: Path) -> None:
    manifest = digest_manifest(open_checkpoint(model), model)
    expected = read_reference(manifest, model)
    flip(model / SECOND)
    seen: dict[str, torch.Tensor] = {}
    with load(manifest, pool, model, verify=True) as loaded:
        with pytest.raises(CorruptCheckpoint):
            seen.update(loaded.tensors())
        assert seen == {} or list(seen)[-1] < "1.6"  # which lies across the wrong chunk's first byte
        assert_same(seen, {name: expected[name] for name in seen})


def test_a_fault_in_one_load_is_no_fault_in_another(pool: Pool, tmp_path: Path) -> None:
    plain_checkpoint(tmp_path / "good", mib=20)
    plain_checkpoint(tmp_path / "bad", mib=20)
    good, bad = open_checkpoint(tmp_path / "good"), open_checkpoint(tmp_path / "bad")
    cut(tmp_path / "bad" / "model.safetensors")
    with load(bad, pool, tmp_path / "bad") as failing, load(good, pool, tmp_path / "good") as loaded:
        assert_same(dict(loaded.tensors()), read_reference(good, tmp_path / "good"))
        with pytest.raises(CorruptCheckpoint):
            failing.wait(30)


@pytest.mark.parametrize("spoil", [cut, grow, overwrite, replace_by_what_never_ends, replace_by_fifo])
def test_digests_are_made_of_the_registered_file_only(model: Path, spoil: Callable[[Path], None]) -> None:
    manifest = open_checkpoint(model)
    spoil(model / SECOND)
    with pytest.raises(CheckpointChanged) as caught:
        digest_manifest(manifest, model)
    assert caught.value.path == str(model / SECOND)


# Faults of the disk: a library between this project and libc makes pread fail as it is told.

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* FAULT: eio (at and after byte FAULT_AT), eintr (every second call), short (at most 5000 bytes at a time). */
static atomic_uint calls;

ssize_t pread64(int fd, void *buffer, size_t size, off64_t offset) {
    static ssize_t (*next)(int, void *, size_t, off64_t);
    if (!next) next = dlsym(RTLD_NEXT, "pread64");
    const char *fault = getenv("FAULT");
    if (!strcmp(fault, "eio") && offset + (off64_t)size > atoll(getenv("FAULT_AT"))) {
        errno = EIO;
        return -1;
    }
    if (!strcmp(fault, "eintr") && atomic_fetch_add(&calls, 1) % 2) {
        errno = EINTR;
        return -1;
    }
    if (!strcmp(fault, "short") && size > 5000) size = 5000;
    return next(fd, buffer, size, offset);
}
ssize_t pread(int fd, void *buffer, size_t size, off_t offset) { return pread64(fd, buffer, size, offset); }
"""

LOADER = r"""
import json, sys
from pathlib import Path
from stoker_checkpoint.load import load
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import ReadFailed
from tests.support.checkpoints import assert_same

directory = Path(sys.argv[1])
manifest = open_checkpoint(directory)
with Pool(4 * CHUNK_BYTES, huge="none", lock=False, reader="threads") as pool:
    try:
        with load(manifest, pool, directory) as loaded:
            assert_same(dict(loaded.tensors()), read_reference(manifest, directory))
        print(json.dumps("same"))
    except ReadFailed as error:
        print(json.dumps([error.path, error.offset_bytes, error.errno]))
    assert pool.native.chunks_free == 4
"""


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    library = directory / "shim.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, directory / "shim.c", "-ldl"], check=True)
    return library


def loaded_under(shim: Path, model: Path, **fault: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(model)],
        env=os.environ | {"LD_PRELOAD": str(shim)} | fault,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_error_of_the_disk_is_told_with_file_offset_and_errno(shim: Path, model: Path) -> None:
    path, offset, number = loaded_under(shim, model, FAULT="eio", FAULT_AT=str(18 * 2**20))
    assert path in {str(model / "model-00000.safetensors"), str(model / SECOND)}
    assert offset == CHUNK_BYTES
    assert number == errno.EIO


@pytest.mark.parametrize("fault", ["eintr", "short"])
def test_interrupted_and_short_reads_go_on_where_they_stopped(shim: Path, model: Path, fault: str) -> None:
    assert loaded_under(shim, model, FAULT=fault) == "same"


def test_a_manifest_remembers_when_its_files_changed(model: Path) -> None:
    manifest: Manifest = open_checkpoint(model)
    assert [shard.mtime_ns for shard in manifest.shards] == [
        (model / shard.name).stat().st_mtime_ns for shard in manifest.shards
    ]
