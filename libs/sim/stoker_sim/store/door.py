"""The node's socket for leases: instances come here, and hold what they get for as long as they stay connected."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from stoker_core.errors import StokerError, Stopping
from stoker_core.runner import Part
from stoker_sim.dice import LONGEST, Dice
from stoker_sim.loop import Process, SimLoop
from stoker_sim.store.pool import Board, SimPool
from stoker_storeagent.ports import Held, Store

HOP_S = 0.001


@dataclass(frozen=True)
class Grant:
    held: Held
    pool: SimPool
    board: Board


@dataclass(eq=False)
class Call:
    """A connection.  hung_up: by the instance.  lost: the agent's end is gone.  answer: a grant or a refusal."""

    model_id: str
    instance_id: str
    answer: asyncio.Future[Grant | StokerError]
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, answer: Grant | StokerError) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def lose(self) -> None:
        self.lost.set()
        self.say(Stopping("the connection was lost"))


class Door:
    """Does what leases.LeaseServer does, without sockets."""

    def __init__(self, store: Store, pool: SimPool, process: Process, loop: SimLoop, dice: Dice) -> None:
        self._store, self._pool, self._process, self._loop, self._dice = store, pool, process, loop, dice
        self._calls: asyncio.Queue[Call] = asyncio.Queue()
        self._stopping = self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.open: set[Call] = set()

    def connect(self, call: Call) -> None:
        """By an instance's hand."""
        if self._closed or not self._process.alive:
            self._hang_up(call)
            return
        self.open.add(call)
        self._idle.clear()
        self._process.on_death(lambda: self._hang_up(call))
        self._calls.put_nowait(call)

    def part(self) -> Part:
        return Part("leases", self._run, stop_intake=self._stop, drain=self._drained)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    call = await self._calls.get()
                    task = group.create_task(self._serve(call), name=f"lease {call.instance_id}")
                    task.add_done_callback(lambda _, call=call: self._ended(call))  # type: ignore[misc]
        finally:
            self._closed = True
            for call in list(self.open):
                self._ended(call)

    def _stop(self) -> None:
        self._stopping = True

    async def _drained(self) -> None:
        await self._idle.wait()

    def _ended(self, call: Call) -> None:
        self._hang_up(call)
        self.open.discard(call)
        if not self.open:
            self._idle.set()

    def _hang_up(self, call: Call) -> None:
        self._loop.later(2 * LONGEST * HOP_S, call.lose)  # after what was said before

    async def _serve(self, call: Call) -> None:
        async def progress(done_bytes: int, total_bytes: int) -> None:
            if call.hung_up.is_set():
                raise ConnectionResetError("the instance has gone")

        try:
            if self._stopping:
                raise Stopping
            async with self._store.lease(call.model_id, call.instance_id, progress, device="") as held:
                grant = Grant(held, self._pool, self._pool.boards[held.descriptors[1]])
                self._loop.later(self._dice.delay_s(HOP_S), lambda: call.say(grant))
                await call.hung_up.wait()
        except StokerError as error:
            refused = error
            self._loop.later(self._dice.delay_s(HOP_S), lambda: call.say(refused))
        except ConnectionResetError:
            pass
