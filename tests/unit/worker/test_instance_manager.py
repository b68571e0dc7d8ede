"""The worker's instances, with a zygote that only notes what it is asked and a test that plays the children."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.unit.worker.test_worker_state import spec, start, state

from stoker_bus.events import EventPublisher
from stoker_bus.memory import MemoryBroker
from stoker_contracts.control import StartInstance
from stoker_contracts.models import EngineKind, InstanceState, StartPhases, Tier
from stoker_core.clock import SystemClock
from stoker_core.errors import EngineFailed
from stoker_core.ids import SequentialIds
from stoker_worker import manager as module
from stoker_worker.manager import InstanceManager
from stoker_worker.processes import PidFiles
from stoker_worker.settings import WorkerSettings
from stoker_worker.state import Instance, WorkerState
from stoker_worker.wire import Busy, EngineReady, InstanceConfig, Load, Stop, Stopping, pack, unpack

STARTING, READY, STOPPING = InstanceState.STARTING, InstanceState.READY, InstanceState.STOPPING
STOPPED, FAILED = InstanceState.STOPPED, InstanceState.FAILED
PID = 4_000_000_001  # above every pid_max: nobody has it


@dataclass
class FakeZygote:
    """children: the instances' ends of their channels, by instance id."""

    ready: bool = True
    children: dict[str, socket.socket] = field(default_factory=dict)

    def fork(self, config: InstanceConfig, channel: socket.socket) -> None:
        if not self.ready:
            raise EngineFailed("the zygote is not ready")
        self.children[config.instance_id] = channel.dup()


class FakePreparer:
    """Settles at once, unless `hangs`."""

    def __init__(self) -> None:
        self.hangs = False

    async def settled(self, model: object) -> None:
        if self.hangs:
            await asyncio.Event().wait()


@dataclass
class Rig:
    state: WorkerState
    manager: InstanceManager
    zygote: FakeZygote
    preparer: FakePreparer
    killed: list[int]
    run: asyncio.Task[None]

    def instance(self, instance_id: str = "i-1") -> Instance:
        return self.state.instances[instance_id]

    def say(self, *messages: object, instance_id: str = "i-1") -> None:
        for message in messages:
            self.zygote.children[instance_id].send(pack(message))  # type: ignore[arg-type]

    def hear(self, instance_id: str = "i-1") -> object:
        child = self.zygote.children[instance_id]
        child.setblocking(False)
        return unpack(Stop, child.recv(1 << 17))

    async def forked(self, command: StartInstance, pid: int = PID) -> None:
        self.manager.start(command)
        await until(lambda: command.instance_id in self.zygote.children)
        self.manager.forked(command.instance_id, pid)

    async def ready(self, command: StartInstance | None = None) -> None:
        command = command or start()
        await self.forked(command)
        ready = EngineReady(phases=StartPhases(), load_source=Tier.PEER, load_origin="n2", ready_at_s=0.0)
        self.say(ready, instance_id=command.instance_id)
        await until(lambda: self.instance(command.instance_id).state is READY)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0)


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    killed: list[int] = []
    null = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(os, "pidfd_open", lambda _: os.dup(null))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda _, number: killed.append(number))
    monkeypatch.setattr(module, "_STOP_REPLY_S", 0.05)
    worker, zygote, preparer, clock = state(), FakeZygote(), FakePreparer(), SystemClock()
    events = EventPublisher(
        MemoryBroker().connect(), service="worker", name="n", boot_id="b", clock=clock, ids=SequentialIds()
    )
    manager = InstanceManager(
        WorkerSettings(node="n", home=tmp_path, devices="cpu"),
        worker,
        {EngineKind.SIM: zygote},  # type: ignore[dict-item]
        preparer,  # type: ignore[arg-type]
        PidFiles(tmp_path / "pids"),
        events,
        clock,
        lambda: None,
    )
    run = asyncio.create_task(manager.run())
    await asyncio.sleep(0)
    yield Rig(worker, manager, zygote, preparer, killed, run)
    run.cancel()
    await asyncio.wait([run])
    os.close(null)
    for child in zygote.children.values():
        child.close()


async def test_an_instance_that_still_starts_is_stopped_by_killing_it_for_it_has_nothing_in_hand(rig: Rig):
    await rig.forked(start())
    assert await rig.manager.stop("i-1", only_if_idle=False)
    assert rig.instance().state is STOPPING
    assert rig.killed == [signal.SIGKILL]
    rig.manager.exited("i-1", -signal.SIGKILL, "")
    assert (rig.instance().state, rig.instance().failure) == (STOPPED, "")


async def test_an_instance_stopped_before_its_pid_is_known_is_killed_once_it_is(rig: Rig):
    rig.manager.start(start())
    await until(lambda: "i-1" in rig.zygote.children)
    assert await rig.manager.stop("i-1", only_if_idle=False)
    assert rig.killed == []
    rig.manager.forked("i-1", PID)
    assert rig.killed == [signal.SIGKILL]


async def test_a_ready_instance_stops_in_order(rig: Rig):
    await rig.ready()
    stopping = asyncio.create_task(rig.manager.stop("i-1", only_if_idle=True))
    await asyncio.sleep(0)
    assert rig.hear() == Stop(only_if_idle=True)
    rig.say(Stopping())
    assert await stopping
    assert rig.instance().state is STOPPING
    rig.manager.exited("i-1", 0, "")
    assert rig.instance().state is STOPPED
    assert rig.killed == []


async def test_a_ready_instance_says_where_its_weights_came_from(rig: Rig):
    await rig.ready()
    status = rig.instance().status(0.0)
    assert (status.load_source, status.load_origin) == (Tier.PEER, "n2")


async def test_an_instance_that_says_late_that_it_stops_is_stopping_and_ends_stopped(rig: Rig):
    """A long engine step may keep it from answering in time."""
    await rig.ready()
    assert not await rig.manager.stop("i-1", only_if_idle=True)
    assert rig.instance().state is READY
    rig.say(Stopping())
    await until(lambda: rig.instance().state is STOPPING)
    rig.manager.exited("i-1", 0, "")
    assert rig.instance().state is STOPPED


async def test_two_stops_at_once_each_hear_their_own_answer(rig: Rig):
    await rig.ready()
    first = asyncio.create_task(rig.manager.stop("i-1", only_if_idle=True))
    second = asyncio.create_task(rig.manager.stop("i-1", only_if_idle=False))
    await asyncio.sleep(0)
    rig.say(Busy(), Stopping())
    assert [await first, await second] == [False, True]
    assert rig.instance().state is STOPPING


async def test_an_answer_to_a_stop_that_was_given_up_is_not_taken_for_the_next_ones(rig: Rig):
    await rig.ready()
    assert not await rig.manager.stop("i-1", only_if_idle=True)
    second = asyncio.create_task(rig.manager.stop("i-1", only_if_idle=False))
    await asyncio.sleep(0)
    rig.say(Busy(), Stopping())
    assert await second
    assert rig.instance().state is STOPPING


async def test_a_start_that_waits_for_its_preparation_is_bound_by_its_budget_and_gives_its_device_back(rig: Rig):
    rig.preparer.hangs = True
    rig.manager.start(start(budget_ms=10))
    await until(lambda: rig.instance().state is FAILED)
    assert rig.instance().failure == "not ready within 0.01 s"
    rig.preparer.hangs = False
    await rig.ready(start(instance_id="i-2"))


async def test_a_start_that_waits_for_its_device_is_bound_by_its_budget(rig: Rig):
    small = spec(weight_bytes=1 << 20)
    await rig.forked(start(model=small))
    rig.manager.start(start(instance_id="i-2", model=small, budget_ms=10))
    await until(lambda: rig.instance("i-2").state is FAILED)
    assert rig.instance().state is STARTING
    assert "i-2" not in rig.zygote.children


async def test_a_start_whose_budget_is_spent_fails_and_does_not_run_for_ever(rig: Rig):
    rig.manager.start(start(budget_ms=0))
    await until(lambda: rig.instance().state is FAILED)


async def test_a_start_over_its_budget_is_killed(rig: Rig):
    await rig.forked(start(budget_ms=10))
    await until(lambda: rig.killed == [signal.SIGKILL])
    rig.manager.exited("i-1", -signal.SIGKILL, "")
    assert (rig.instance().state, rig.instance().failure) == (FAILED, "not ready within 0.01 s")


async def test_a_fork_that_is_never_answered_fails_its_start_and_dies_if_it_comes_after_all(rig: Rig):
    rig.manager.start(start(budget_ms=10))
    await until(lambda: rig.instance().state is FAILED)
    rig.state.instances.clear()  # forgotten by then
    rig.manager.forked("i-1", PID)
    assert rig.killed == [signal.SIGKILL]
    rig.manager.exited("i-1", -signal.SIGKILL, "")


async def test_a_start_without_file_descriptors_fails_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    def none_left() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module, "packet_pair", none_left)
        rig.manager.start(start())
        await until(lambda: rig.instance().state is FAILED)
    assert "Too many open files" in rig.instance().failure
    assert not rig.run.done()
    await rig.ready(start(instance_id="i-2"))


async def test_an_instance_that_cannot_be_watched_is_ended_by_its_channel(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    def none_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", none_left)
    await rig.forked(start())
    assert rig.zygote.children["i-1"].recv(1) == b"", "the end of its channel: it exits"
    rig.manager.exited("i-1", 1, "")
    assert (rig.instance().state, "Too many open files" in rig.instance().failure) == (FAILED, True)


async def test_a_zygote_that_is_not_ready_fails_the_start_and_the_device_is_free(rig: Rig):
    rig.zygote.ready = False
    rig.manager.start(start())
    await until(lambda: rig.instance().state is FAILED)
    rig.zygote.ready = True
    await rig.ready(start(instance_id="i-2"))


async def test_a_full_disk_costs_no_instance(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        patch.setattr(Path, "unlink", full)
        await rig.ready()
        rig.manager.exited("i-1", -signal.SIGKILL, "")
    assert "SIGKILL" in rig.instance().failure


async def test_an_instance_may_die_by_any_signal(rig: Rig):
    await rig.ready()
    rig.manager.exited("i-1", -(signal.SIGRTMIN + 2), "")
    assert rig.instance().state is FAILED
    assert str(signal.SIGRTMIN + 2) in rig.instance().failure


async def test_what_an_instance_said_last_is_heard_before_its_end(rig: Rig):
    await rig.ready()
    rig.say(Load(room=1, running=1, arrivals=7, finishes=6, idle_ms=0))
    rig.manager.exited("i-1", 1, "")
    assert (rig.instance().state, rig.instance().arrivals) == (FAILED, 7)


async def test_no_descriptor_outlives_its_instance(rig: Rig):
    for number in range(3):
        await rig.ready(start(instance_id=f"i-{number}"))
        before = len(os.listdir("/proc/self/fd"))
        rig.manager.exited(f"i-{number}", -signal.SIGKILL, "")
        assert len(os.listdir("/proc/self/fd")) == before - 2, "its channel and its pidfd"


async def test_stopping_all_ends_what_waits_what_starts_and_what_runs(rig: Rig):
    small = spec(weight_bytes=1 << 20)
    await rig.ready(start(instance_id="runs", model=small))
    await rig.forked(start(instance_id="starts", model=small))
    rig.manager.start(start(instance_id="waits", model=small))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(rig.manager.stop_all())
    rig.say(Stopping(), instance_id="runs")
    await until(lambda: rig.instance("runs").state is STOPPING and rig.instance("starts").state is STOPPING)
    assert rig.instance("waits").state is STOPPED
    rig.manager.exited("starts", -signal.SIGKILL, "")
    assert not stopping.done()
    rig.manager.exited("runs", 0, "")
    await stopping
    await asyncio.sleep(0)
    assert list(rig.zygote.children) == ["runs", "starts"], "what waited was never forked"
