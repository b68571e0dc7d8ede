import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_model import write_tiny_model

from stoker_contracts.control import RegisterModel
from stoker_contracts.models import ModelSpec, Tier
from stoker_core.clock import SystemClock
from stoker_core.errors import (
    CorruptCheckpoint,
    DatabaseUnavailable,
    ModelNotFound,
    RefusedCheckpoint,
    StokerError,
    Stopping,
    TierFull,
)
from stoker_core.ids import SequentialIds
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import ModelFile
from stoker_storeagent.adapters.catalogue import DatabaseCatalogue
from stoker_storeagent.adapters.ssd import SsdDirectory, StoredFile
from stoker_storeagent.filler import Filler
from stoker_storeagent.loops import Keeper
from stoker_storeagent.register import Registrar
from stoker_storeagent.sources import Sources
from stoker_storeagent.tier import SsdTier


class WatchedDirectory(SsdDirectory):
    """Counts copies, can hold them up, and can be out of room as a disk that others fill."""

    def __init__(self, root: Path, ids: SequentialIds) -> None:
        super().__init__(root, ids)
        self.begun = 0
        self.gate: threading.Event | None = None  # a copy waits for it, or for its cancellation
        self.full_times = 0

    def begin(self, model_id: str, files: Sequence[ModelFile]) -> Path:
        self.begun += 1
        if self.full_times:
            self.full_times -= 1
            raise TierFull("ssd", 1, 0)
        return super().begin(model_id, files)

    def copy(
        self,
        source: Path,
        target: Path,
        file: ModelFile,
        *,
        chunk_bytes: int,
        cancelled: threading.Event,
        on_bytes: Callable[[int], None],
    ) -> StoredFile:
        while self.gate is not None and not self.gate.wait(0.01) and not cancelled.is_set():
            pass
        return super().copy(source, target, file, chunk_bytes=chunk_bytes, cancelled=cancelled, on_bytes=on_bytes)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@dataclass
class Rig:
    ssd: WatchedDirectory
    database: MemoryDatabase
    tmp_path: Path
    capacity_bytes: int = 1 << 30
    allowed_roots: Sequence[Path] = (Path("/"),)
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    tier: SsdTier = field(init=False)

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.events.append((event[1], subject, data))

    def build(self) -> None:
        self.tier = SsdTier(
            self.ssd,
            Filler(self.ssd, Sources(self.allowed_roots), copies_at_once=2, chunk_bytes=4096),
            DatabaseCatalogue(self.database),
            self,
            SystemClock(),
            capacity_bytes=self.capacity_bytes,
            changed=lambda: None,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[SsdTier]:
        """A start of the agent: opens the tier anew."""
        self.build()
        await self.tier.open()
        part = self.tier.part()
        task = asyncio.ensure_future(part.run())
        await asyncio.sleep(0)
        try:
            yield self.tier
        finally:
            assert part.stop_intake is not None
            part.stop_intake()
            task.cancel()
            await asyncio.wait([task])

    async def model(self, name: str, **shape: Any) -> ModelSpec:
        source = write_tiny_model(self.tmp_path / name, tokenizer=False, seed=len(name), **shape)
        (source / "tokenizer.json").write_text("{}")
        registrar = Registrar(self.database.models, Sources([Path("/")]), self, self.ids)
        return (await registrar.register(RegisterModel(name=name, source=str(source)))).model

    ids: SequentialIds = field(default_factory=SequentialIds)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(WatchedDirectory(tmp_path / "ssd", SequentialIds()), MemoryDatabase(), tmp_path)


async def ignore(_: int, __: int) -> None:
    pass


async def lease_and_return(tier: SsdTier, model_id: str) -> Tier:
    async with tier.lease(model_id, ignore) as held:
        assert (held.path / "config.json").is_file()
        return held.source


async def test_the_first_lease_copies_and_the_next_finds_the_copy(rig: Rig) -> None:
    spec = await rig.model("m", shards=2)
    async with rig.running() as tier:
        async with tier.lease(spec.model_id, ignore) as held:
            assert held.source is Tier.REMOTE
            for name in ("config.json", "model-00001-of-00002.safetensors"):
                assert (held.path / name).read_bytes() == (rig.tmp_path / "m" / name).read_bytes()
        async with tier.lease(spec.model_id, ignore) as held:
            assert held.source is Tier.SSD
        ssd, remote = tier.status()
    assert rig.ssd.begun == 1
    assert (ssd.hits, ssd.misses, ssd.used_bytes) == (1, 1, held.total_bytes)
    assert remote.read_bytes_per_s > 0
    assert [what for what, _, _ in rig.events] == ["registered", "filling", "filled"]


async def test_the_first_arrival_binds_every_digest(rig: Rig) -> None:
    spec = await rig.model("m")
    async with rig.running() as tier:
        await lease_and_return(tier, spec.model_id)
    files = await rig.database.models.files(spec.model_id, with_content=False)
    assert all(file.digest.startswith("sha256:") for file in files)


async def test_concurrent_leases_share_one_copy(rig: Rig) -> None:
    spec = await rig.model("m")
    async with rig.running() as tier:
        sources = await asyncio.gather(*(lease_and_return(tier, spec.model_id) for _ in range(20)))
    assert set(sources) == {Tier.REMOTE}
    assert rig.ssd.begun == 1


async def test_who_waits_is_told_the_progress(rig: Rig) -> None:
    spec = await rig.model("m")
    rig.ssd.gate = threading.Event()
    seen: list[tuple[int, int]] = []

    async def progress(done: int, total: int) -> None:
        seen.append((done, total))
        assert rig.ssd.gate is not None
        rig.ssd.gate.set()

    async with rig.running() as tier, tier.lease(spec.model_id, progress) as held:
        assert seen[0] == (0, held.total_bytes)


async def test_a_waiter_that_leaves_does_not_stop_the_copy_for_others(rig: Rig) -> None:
    spec = await rig.model("m")
    rig.ssd.gate = threading.Event()
    async with rig.running() as tier:
        leaver, stayer = (asyncio.create_task(lease_and_return(tier, spec.model_id)) for _ in range(2))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
        rig.ssd.gate.set()
        assert await stayer is Tier.REMOTE
        assert tier.held()[0].leases == 0


async def test_the_least_recently_used_model_makes_room(rig: Rig) -> None:
    a, b, c = [await rig.model(name) for name in "abc"]
    rig.capacity_bytes = await total_bytes(rig, a) * 2
    async with rig.running() as tier:
        await lease_and_return(tier, a.model_id)
        await lease_and_return(tier, b.model_id)
        await lease_and_return(tier, a.model_id)
        await lease_and_return(tier, c.model_id)
        assert rig.ssd.names() == sorted([a.model_id, c.model_id])
        assert tier.status()[0].used_bytes <= rig.capacity_bytes
    assert [(what, model) for what, model, _ in rig.events if what == "evicted"] == [("evicted", b.model_id)]


async def total_bytes(rig: Rig, spec: ModelSpec) -> int:
    return sum(file.size_bytes for file in await rig.database.models.files(spec.model_id, with_content=False))


async def test_a_leased_model_is_never_evicted(rig: Rig) -> None:
    a, b = [await rig.model(name) for name in "ab"]
    rig.capacity_bytes = await total_bytes(rig, a)
    async with rig.running() as tier:
        async with tier.lease(a.model_id, ignore) as held:
            with pytest.raises(TierFull):
                await lease_and_return(tier, b.model_id)
            assert not await tier.drop(a.model_id, "deleted")
            assert (held.path / "model.safetensors").is_file()
        assert await lease_and_return(tier, b.model_id) is Tier.REMOTE
        assert rig.ssd.names() == [b.model_id]


async def test_a_model_larger_than_the_tier_is_refused_and_nothing_is_evicted_for_it(rig: Rig) -> None:
    small, large = await rig.model("s"), await rig.model("l", layers=8)
    rig.capacity_bytes = await total_bytes(rig, small)
    async with rig.running() as tier:
        await lease_and_return(tier, small.model_id)
        with pytest.raises(TierFull):
            await lease_and_return(tier, large.model_id)
        assert rig.ssd.names() == [small.model_id]


async def test_a_full_disk_evicts_what_the_budget_would_keep(rig: Rig) -> None:
    a, b = [await rig.model(name) for name in "ab"]
    async with rig.running() as tier:
        await lease_and_return(tier, a.model_id)
        rig.ssd.full_times = 1
        await lease_and_return(tier, b.model_id)
        assert rig.ssd.names() == [b.model_id]
        rig.ssd.full_times = 2
        async with tier.lease(b.model_id, ignore):
            with pytest.raises(TierFull):
                await lease_and_return(tier, a.model_id)
        assert rig.ssd.names() == [b.model_id]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def refused(tier: SsdTier, model_id: str, error: type[StokerError]) -> StokerError:
    with pytest.raises(error) as caught:
        await lease_and_return(tier, model_id)
    return caught.value


async def test_a_small_file_that_changed_since_registration_is_refused(rig: Rig) -> None:
    spec = await rig.model("m")
    config = rig.tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    async with rig.running() as tier:
        await refused(tier, spec.model_id, CorruptCheckpoint)
        assert rig.ssd.names() == []
        assert tier.status()[0].used_bytes == 0
    files = await rig.database.models.files(spec.model_id, with_content=False)
    assert {file.digest for file in files if file.path == "model.safetensors"} == {""}


async def test_weights_that_changed_since_their_first_arrival_are_refused(rig: Rig) -> None:
    spec = await rig.model("m")
    async with rig.running() as tier:
        await lease_and_return(tier, spec.model_id)
        assert await tier.drop(spec.model_id, "test")
        flip_last_byte(rig.tmp_path / "m" / "model.safetensors")
        await refused(tier, spec.model_id, CorruptCheckpoint)
        assert rig.ssd.names() == []
        flip_last_byte(rig.tmp_path / "m" / "model.safetensors")
        assert await lease_and_return(tier, spec.model_id) is Tier.REMOTE


async def test_weights_that_changed_size_or_shape_before_their_first_arrival_are_refused(rig: Rig) -> None:
    spec = await rig.model("m")
    weights = rig.tmp_path / "m" / "model.safetensors"
    good = weights.read_bytes()
    async with rig.running() as tier:
        for bad in (good[:-1], good + b"x", good.replace(b'"BF16"', b'"BF17"', 1)):
            weights.write_bytes(bad)
            await refused(tier, spec.model_id, CorruptCheckpoint)
            assert rig.ssd.names() == []
        weights.unlink()
        await refused(tier, spec.model_id, RefusedCheckpoint)
        weights.write_bytes(good)
        assert await lease_and_return(tier, spec.model_id) is Tier.REMOTE
        assert tier.status()[1].misses == 4


async def test_a_source_that_this_node_does_not_allow_is_not_copied(rig: Rig) -> None:
    spec = await rig.model("m")
    rig.allowed_roots = [rig.tmp_path / "elsewhere"]
    async with rig.running() as tier:
        error = await refused(tier, spec.model_id, RefusedCheckpoint)
        assert "STOKER_STOREAGENT_ALLOWED_ROOTS" in error.message
        assert rig.ssd.names() == []


async def test_an_unknown_model_is_not_found(rig: Rig) -> None:
    async with rig.running() as tier:
        await refused(tier, "model-none", ModelNotFound)
        assert rig.ssd.names() == []


async def test_without_the_database_what_is_here_is_leased_and_the_rest_may_be_asked_for_again(rig: Rig) -> None:
    here, elsewhere = [await rig.model(name) for name in "ab"]
    async with rig.running() as tier:
        await lease_and_return(tier, here.model_id)
    rig.database.go_down()
    async with rig.running() as tier:
        assert await lease_and_return(tier, here.model_id) is Tier.SSD
        error = await refused(tier, elsewhere.model_id, DatabaseUnavailable)
        assert error.retryable
        rig.database.come_up()
        assert await lease_and_return(tier, elsewhere.model_id) is Tier.REMOTE


async def test_a_stop_gives_up_copies_and_leaves_nothing(rig: Rig) -> None:
    spec = await rig.model("m")
    rig.ssd.gate = threading.Event()
    async with rig.running() as tier:
        waiting = asyncio.create_task(lease_and_return(tier, spec.model_id))
        while not rig.ssd.names():
            await asyncio.sleep(0.01)
    with pytest.raises(Stopping):
        await waiting
    assert rig.ssd.names() == []


async def test_a_stop_before_the_copy_began_leaves_nobody_waiting(rig: Rig) -> None:
    spec = await rig.model("m")
    async with rig.running() as tier:
        waiting = asyncio.create_task(lease_and_return(tier, spec.model_id))
        await asyncio.sleep(0)
    with pytest.raises(Stopping):
        await waiting


async def test_a_start_adopts_what_is_complete_and_removes_leftovers(rig: Rig) -> None:
    spec = await rig.model("m")
    async with rig.running() as tier:
        await lease_and_return(tier, spec.model_id)
    (rig.ssd.root / ".tmp-model-x-1").mkdir()
    async with rig.running() as tier:
        assert rig.ssd.names() == [spec.model_id]
        assert [held.model_id for held in tier.held()] == [spec.model_id]
        assert tier.status()[0].used_bytes == await total_bytes(rig, spec)


async def test_a_start_with_less_capacity_evicts_the_oldest(rig: Rig) -> None:
    a, b = [await rig.model(name) for name in "ab"]
    async with rig.running() as tier:
        await lease_and_return(tier, a.model_id)
        await lease_and_return(tier, b.model_id)
    rig.capacity_bytes = await total_bytes(rig, a)
    async with rig.running() as tier:
        assert rig.ssd.names() == [b.model_id]


async def test_no_capacity_means_a_share_of_the_disk_and_a_restart_does_not_shrink_it(rig: Rig) -> None:
    rig.capacity_bytes = 0
    async with rig.running() as tier:
        assert 0 < tier.status()[0].capacity_bytes < 1 << 60


async def test_a_deleted_model_is_dropped_once_it_is_not_leased(rig: Rig) -> None:
    kept, gone = [await rig.model(name) for name in "ab"]
    async with rig.running() as tier:
        keeper = Keeper(rig.database, tier, node="n1", keep_s=1.0)
        await lease_and_return(tier, kept.model_id)
        async with tier.lease(gone.model_id, ignore) as held:
            await keeper.reconcile()
            placed = {p.model_id: p.held_bytes for p in await rig.database.tiers.placements()}
            assert placed == {kept.model_id: await total_bytes(rig, kept), gone.model_id: held.total_bytes}
            await rig.database.models.delete("b")
            await keeper.reconcile()
            assert held.path.is_dir()
        await keeper.reconcile()
        assert rig.ssd.names() == [kept.model_id]
        assert [p.model_id for p in await rig.database.tiers.placements()] == [kept.model_id]
