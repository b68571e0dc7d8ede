import asyncio
import errno
import os
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
from tests.support.tiny_model import write_tiny_model

from stoker_checkpoint.digests import digest_manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    PoolExhausted,
    ReadFailed,
    RefusedCheckpoint,
    StokerError,
)
from stoker_core.ids import SequentialIds
from stoker_db.ports import ModelFile
from stoker_storeagent import plans as plans_module
from stoker_storeagent.adapters.ssd import SsdDirectory, StoredModel
from stoker_storeagent.dram import is_lasting
from stoker_storeagent.plans import Plans

WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def ssd(tmp_path: Path) -> SsdDirectory:
    """With a copy of a model of two shards, `m`."""
    made = SsdDirectory(tmp_path / "ssd", SequentialIds())
    made.open()
    publish(made, write_tiny_model(tmp_path / "source", tokenizer=False, shards=2))
    return made


def publish(ssd: SsdDirectory, source: Path) -> None:
    files = [ModelFile(path=path.name, size_bytes=path.stat().st_size) for path in sorted(source.iterdir())]
    target = ssd.begin("m", files)
    stored = [
        ssd.copy(source, target, file, chunk_bytes=65536, cancelled=threading.Event(), on_bytes=lambda _: None)
        for file in files
    ]
    ssd.publish(target, StoredModel(model_id="m", name="tiny", files=tuple(stored)))


async def test_a_checkpoint_is_known_with_the_times_and_digests_of_its_copy(ssd: SsdDirectory) -> None:
    known = await Plans(ssd).of("m")
    assert known.name == "tiny"
    assert known.verified
    assert known.manifest == digest_manifest(open_checkpoint(ssd.path("m")), ssd.path("m"))
    assert len(known.plan.positions) == 2


async def test_all_who_ask_share_one_parse_until_the_copy_is_gone(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []
    monkeypatch.setattr(plans_module, "open_checkpoint", lambda path: parsed.append(path) or open_checkpoint(path))
    plans = Plans(ssd)
    first, second = await asyncio.gather(plans.of("m"), plans.of("m"))
    assert await plans.of("m") is first is second
    assert len(parsed) == 1
    plans.forget("m")
    assert await plans.of("m") == first
    assert len(parsed) == 2


async def test_the_least_recently_used_is_parsed_again(ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans_module, "PLANS_MAX", 2)
    for other in ("n", "o"):
        shutil.copytree(ssd.path("m"), ssd.path(other))
        record = ssd.path(other) / "stoker.json"
        record.write_text(record.read_text().replace('"model_id": "m"', f'"model_id": "{other}"'))
    plans = Plans(ssd)
    kept, lost = await plans.of("m"), await plans.of("n")
    assert await plans.of("m") is kept
    await plans.of("o")
    assert await plans.of("m") is kept
    assert await plans.of("n") is not lost


@pytest.mark.parametrize("damage", ["longer", "missing", "header", "unknown"])
async def test_a_copy_that_is_not_what_was_written_is_refused_and_asked_again_it_is_looked_at_again(
    ssd: SsdDirectory, damage: str
) -> None:
    path = ssd.path("m") / WEIGHTS
    good = path.read_bytes()
    record = ssd.path("m") / "stoker.json"
    stored = ssd.stored("m")
    if damage == "missing":
        path.unlink()
    elif damage == "unknown":
        files = tuple(file for file in stored.files if file.path != WEIGHTS)
        record.write_bytes(msgspec.json.encode(msgspec.structs.replace(stored, files=files)))
    else:
        path.write_bytes(b"\xff" + good[1:] if damage == "header" else good + b"x")
    plans = Plans(ssd)
    error = {"missing": RefusedCheckpoint, "unknown": CheckpointChanged}.get(damage, CorruptCheckpoint)
    with pytest.raises(error):
        await plans.of("m")
    path.write_bytes(good)
    record.write_bytes(msgspec.json.encode(stored))
    assert (await plans.of("m")).name == "tiny"


@pytest.mark.parametrize("path", ["stoker.json", WEIGHTS])
async def test_a_want_of_descriptors_does_not_tell_against_the_copy(
    ssd: SsdDirectory, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: object, **options: object) -> object:
        if self.name == path:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RefusedCheckpoint) as caught:
        await Plans(ssd).of("m")
    assert not is_lasting(caught.value)


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (CheckpointChanged("w", "it has 1 bytes, not 2"), True),
        (CorruptCheckpoint("w", "the chunk at byte 0 has another digest"), True),
        (ReadFailed("w", 0, errno.EIO), True),
        (ReadFailed("w", 0, errno.ENOENT), True),
        (ReadFailed("w", 0, errno.EMFILE), False),
        (ReadFailed("w", 0, errno.ETIMEDOUT), False),
        (PoolExhausted(1, 0), False),
    ],
    ids=str,
)
def test_only_what_another_copy_mends_tells_against_a_copy(error: StokerError, lasting: bool) -> None:
    assert is_lasting(error) is lasting


async def test_a_file_written_to_since_keeps_the_time_of_its_copy_so_that_a_reading_finds_out(
    ssd: SsdDirectory,
) -> None:
    path = ssd.path("m") / WEIGHTS
    before = path.stat().st_mtime_ns
    os.utime(path, ns=(before + 10**9, before + 10**9))
    known = await Plans(ssd).of("m")
    assert [shard.mtime_ns for shard in known.manifest.shards if shard.name == WEIGHTS] == [before]
