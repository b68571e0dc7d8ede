"""Weights leased for a GPU: the whole agent feeding rings on a stand-in for libcuda. No GPU takes part.

Functions called by_… run in a process that finds the stand-in, the agent and its clients in one, but for the client that dies.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.descriptors import descriptors_before
from tests.support.fake_cuda import UUIDS, StandInMemory, Submit, fake_cuda, processes, same
from tests.support.leasing import write_model
from tests.support.services import eventually
from tests.support.storeagent_rig import POOL_CHUNKS, Agent, agent

from stoker_checkpoint.device_ring import DeviceCheckpoint, open_ring
from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.load import attach
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.reference import read_reference
from stoker_contracts.models import Tier
from stoker_core.errors import InvalidMessage, InvalidSettings, LoadCancelled, NativeUnavailable
from stoker_storeagent import rings
from stoker_worker.instance.lease import Lease

BOUND_S = 60.0
SLOTS = 3

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Submit]]:
    with processes(tmp_path_factory.mktemp("driver")) as make:
        yield make


@pytest.fixture(scope="module")
def run(new_process: Callable[[], Submit]) -> Callable[..., Any]:
    submit = new_process()
    return lambda function, *arguments: submit(run_there, function, *arguments).result(BOUND_S)


def run_there(function: Callable[..., Awaitable[None]], *arguments: object) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(BOUND_S / 2):
            await function(*arguments)

    asyncio.run(bounded())
    gc.collect()  # a pool is pinned until it is gone
    assert fake_cuda().fake_cuda_live() == 0, "something is left on the device"


@asynccontextmanager
async def ring_agent(tmp_path: Path, **settings: object) -> AsyncIterator[Agent]:
    """Its pool is pinned. Everything else on the device is gone again when the block ends."""
    async with agent(tmp_path, ring_slots=SLOTS, **settings) as store:
        assert await asyncio.to_thread(store.pool.wait_warm, BOUND_S)
        # A chunk is warm a moment before it is pinned.
        await eventually(lambda: fake_cuda().fake_cuda_registered() == POOL_CHUNKS, what="the pool is pinned")
        assert fake_cuda().fake_cuda_live() == POOL_CHUNKS
        yield store
        await eventually(lambda: fake_cuda().fake_cuda_live() == POOL_CHUNKS, what="rings and feeders are gone")


def take_lease(socket: Path, model_id: str, device: str) -> Lease:
    return Lease(socket, model_id=model_id, instance_id="i", timeout_s=BOUND_S, device=device)


@asynccontextmanager
async def leased(store: Agent, model_id: str, device: str = UUIDS[0]) -> AsyncIterator[Lease]:
    lease = await asyncio.to_thread(take_lease, store.socket, model_id, device)
    with lease:
        yield lease


def checkpoint(lease: Lease, memory: StandInMemory, ordinal: int = 0) -> DeviceCheckpoint:
    manifest = read_manifest(lease.path)
    view = open_ring(lease.ring_fd, lease.ring_board_fd, ordinal)
    return DeviceCheckpoint(manifest, plan_reads(manifest), view, memory, lease.path, alive=lease.alive)


def taken(loaded: DeviceCheckpoint, memory: StandInMemory) -> Tensors:
    """Every tensor, kept as it came."""
    tensors = dict(loaded.tensors())
    memory.mark().synchronize()
    return tensors


async def take(lease: Lease, memory: StandInMemory, ordinal: int = 0) -> Tensors:
    return await asyncio.to_thread(lambda: taken(checkpoint(lease, memory, ordinal), memory))


def expected(source: Path) -> Tensors:
    return read_reference(open_checkpoint(source), source)


def assert_same(tensors: Tensors, source: Path) -> None:
    wanted = expected(source)
    assert list(tensors) == list(wanted)
    assert all(same(tensors[name], wanted[name]) for name in wanted)


async def by_models(tmp_path: Path, chunks: int) -> None:
    source, other = write_model(tmp_path / "m", chunks, seed=1), write_model(tmp_path / "other", chunks, seed=2)
    memory = StandInMemory()
    async with ring_agent(tmp_path) as store:
        model_id, other_id = [(await store.register(path, path.name)).model_id for path in (source, other)]
        async with leased(store, model_id) as lease:
            assert lease.granted.ring
            kept = await take(lease, memory)
            assert len(memory.lent) == 1  # what lies in the ring: the other slots are those that are never lent
        async with leased(store, other_id) as lease:
            assert_same(await take(lease, StandInMemory()), other)
        assert_same(kept, source)  # though its lease has ended and its chunks may be another's
        await eventually(lambda: not any(held.leases for held in store.held()))
        in_pool = chunks if chunks <= POOL_CHUNKS else 0
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == in_pool * CHUNK_BYTES, what="the windows' end")
        del kept


@pytest.mark.parametrize("chunks", [POOL_CHUNKS, POOL_CHUNKS + 2], ids=["whole", "through a window"])
def test_tensors_come_through_the_ring_and_stay_for_as_long_as_they_are_kept(
    run: Callable[..., Any], tmp_path: Path, chunks: int
) -> None:
    run(by_models, tmp_path, chunks)


async def by_device(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 2)
    async with ring_agent(tmp_path) as store:
        model_id = (await store.register(source)).model_id
        async with leased(store, model_id, UUIDS[0]) as first, leased(store, model_id, UUIDS[1]) as second:
            with pytest.raises(InvalidMessage, match="another device"):
                checkpoint(second, StandInMemory(), 0)
            assert_same(await take(second, StandInMemory(), 1), source)
            assert_same(await take(first, StandInMemory(), 0), source)
            assert store.told("filling", Tier.DRAM) == [model_id], "both are fed by one reading"


def test_each_lease_has_a_ring_on_the_device_that_it_names(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_device, tmp_path)


async def assert_from_pool(store: Agent, model_id: str, source: Path, device: str = UUIDS[0]) -> None:
    async with leased(store, model_id, device) as lease:
        assert not lease.granted.ring
        assert (lease.ring_fd, lease.ring_board_fd) == (-1, -1)
        manifest = read_manifest(lease.path)
        fds = lease.pool_fd, lease.board_fd

        def read() -> Tensors:
            with attach(manifest, plan_reads(manifest), *fds, directory=lease.path) as loaded:
                return dict(loaded.tensors())

        assert_same(await asyncio.to_thread(read), source)


async def by_refusal(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", POOL_CHUNKS + 1)
    async with ring_agent(tmp_path) as store:
        model_id = (await store.register(source)).model_id
        for call in (b"cuMemCreate", b"cuMemExportToShareableHandle"):
            fake_cuda().fake_cuda_fail(call, 0, 2)
            await assert_from_pool(store, model_id, source)
        fake_cuda().fake_cuda_fail(None, 0, 0)
        await assert_from_pool(store, model_id, source, "GPU-of-another-machine")
        await assert_from_pool(store, model_id, source, "")
        async with leased(store, model_id) as lease:
            assert_same(await take(lease, StandInMemory()), source)


def test_who_can_get_no_ring_gets_the_weights_from_the_pool(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_refusal, tmp_path)


async def by_silence(tmp_path: Path) -> None:
    source, answers, make = write_model(tmp_path / "m", 1), threading.Event(), rings._make
    asked: list[str] = []

    def late(*arguments: Any) -> Any:
        asked.append(arguments[0])
        assert answers.wait(BOUND_S)
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rings, "MAKE_S", 0.05)
        patch.setattr(rings, "_make", late)
        async with ring_agent(tmp_path) as store:
            model_id = (await store.register(source)).model_id
            for _ in range(2):
                await assert_from_pool(store, model_id, source)
            assert asked == [UUIDS[0]], "no thread waits for it but one"
            answers.set()

            async def ringed() -> bool:
                async with leased(store, model_id) as lease:
                    return lease.granted.ring

            await eventually(ringed, what="a ring, now that it answers")


def test_a_device_that_does_not_answer_holds_no_lease_up(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_silence, tmp_path)


async def by_setting(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 1)
    async with agent(tmp_path, ring_slots=0) as store:
        await assert_from_pool(store, (await store.register(source)).model_id, source)
        assert await asyncio.to_thread(store.pool.wait_warm, BOUND_S)
        assert fake_cuda().fake_cuda_live() == 0, "nor is the pool pinned"
    with pytest.raises(InvalidSettings, match="RING_SLOTS"):
        async with agent(tmp_path, ring_slots=1):
            pass


def test_rings_can_be_switched_off(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_setting, tmp_path)


async def by_failing_device(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", 2)
    async with ring_agent(tmp_path) as store:
        model_id = (await store.register(source)).model_id
        fake_cuda().fake_cuda_fail(b"cuMemcpyHtoDAsync", 1, 700)
        async with leased(store, model_id) as lease:
            with pytest.raises(NativeUnavailable, match="700"):
                await take(lease, StandInMemory())
        fake_cuda().fake_cuda_fail(None, 0, 0)
        async with leased(store, model_id) as lease:
            assert_same(await take(lease, StandInMemory()), source)


def test_a_device_that_fails_in_mid_load_fails_that_lease_alone(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_failing_device, tmp_path)


async def by_stop(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", POOL_CHUNKS + 2)
    async with ring_agent(tmp_path, drain_s=0.1) as store:
        model_id = (await store.register(source)).model_id
        async with leased(store, model_id) as lease:
            tensors = checkpoint(lease, StandInMemory()).tensors()
            kept = [await asyncio.to_thread(next, tensors)]  # the ring holds no more than half of the load
            store.stop.set()
            await eventually(lambda: not lease.alive(), what="the end of the lease")
            with pytest.raises(LoadCancelled):
                await asyncio.to_thread(list, tensors)
            assert same(kept[0][1], expected(source)[kept[0][0]])
            del tensors, kept


def test_a_stop_of_the_agent_in_mid_load_ends_it(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_stop, tmp_path)


async def by_repeating(tmp_path: Path) -> None:
    source, large = write_model(tmp_path / "m", 1), write_model(tmp_path / "large", POOL_CHUNKS + 1)
    async with ring_agent(tmp_path) as store:
        model_ids = [(await store.register(path, path.name)).model_id for path in (source, large)]

        async def all_kinds() -> None:
            for model_id in model_ids:
                async with leased(store, model_id) as lease:
                    await take(lease, StandInMemory())
                async with leased(store, model_id):
                    pass  # never looked at

        await all_kinds()
        before = descriptors_before()
        for _ in range(5):
            await all_kinds()
        await eventually(lambda: descriptors_before() <= before, what="no more descriptors than before")


def test_leases_with_a_ring_leave_no_descriptor_behind(run: Callable[..., Any], tmp_path: Path) -> None:
    run(by_repeating, tmp_path)


async def by_a_client_that_dies(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", POOL_CHUNKS + 2)
    async with ring_agent(tmp_path) as store:
        model_id = (await store.register(source)).model_id
        async with leased(store, model_id):
            pass  # what the first one opens for all stays open
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0)
        before = descriptors_before()
        (tmp_path / "new").write_text(f"{store.socket} {model_id}")
        (tmp_path / "new").rename(tmp_path / "agent")
        await eventually(lambda: (tmp_path / "killed").exists(), timeout_s=BOUND_S / 2)
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="the window's chunks are free")
        await eventually(lambda: fake_cuda().fake_cuda_live() == POOL_CHUNKS, what="the ring is gone")
        await eventually(lambda: descriptors_before() <= before, what="no more descriptors than before")
        assert not any(held.leases for held in store.held())


def die_in_mid_load(tmp_path: Path) -> None:
    socket, model_id = (tmp_path / "agent").read_text().split()
    lease = take_lease(Path(socket), model_id, UUIDS[0])
    tensors = checkpoint(lease, StandInMemory()).tensors()
    kept = [next(tensors)]  # the ring holds no more than half of the load
    (tmp_path / "took").write_text(kept[0][0])
    os.kill(os.getpid(), signal.SIGKILL)


async def test_of_a_client_that_is_killed_in_mid_load_nothing_is_left(
    new_process: Callable[[], Submit], tmp_path: Path
) -> None:
    serving = new_process()(run_there, by_a_client_that_dies, tmp_path)
    await eventually(lambda: (tmp_path / "agent").exists() or serving.done(), timeout_s=BOUND_S)
    with pytest.raises(BrokenProcessPool):
        await asyncio.to_thread(new_process()(die_in_mid_load, tmp_path).result, BOUND_S)
    assert (tmp_path / "took").exists()
    (tmp_path / "killed").touch()
    await asyncio.to_thread(serving.result, BOUND_S)
