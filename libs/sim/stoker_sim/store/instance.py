"""An instance that starts: it leases a model, reads all that it is granted, and compares every byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stoker_core.errors import LoadCancelled, StokerError
from stoker_sim.dice import Dice
from stoker_sim.loop import Process, SimLoop
from stoker_sim.store.contents import Contents
from stoker_sim.store.door import HOP_S, Call, Door, Grant
from stoker_sim.store.flaws import Flaws
from stoker_sim.store.pool import Board, State

READ_S = 0.002
PATIENCE_S = 0.1
"""How often an instance that waits looks whether the agent is still there."""
LINGERS_S = (0.01, 0.5, 3.0)
"""How long an instance may take until it copies its last tensor: on average, of one kind or another."""


class Instance:
    """outcome: None while it starts; else empty for a start that succeeded, or the code of what failed.

    lingers_s: how long it takes until it copies its last tensors; None: drawn.
    """

    def __init__(
        self, instance_id: str, contents: Contents, door: Door | None, loop: SimLoop, dice: Dice, flaws: Flaws
    ) -> None:
        self.instance_id, self.contents = instance_id, contents
        self.process = Process(instance_id)
        self.outcome: str | None = None
        self.lingers_s: float | None = None
        self._door, self._loop, self._dice, self._flaws = door, loop, dice, flaws
        self._grant: Grant | None = None
        self._call = Call(contents.model_id, instance_id, loop.create_future())

    def start(self, ended: Callable[[], None]) -> None:
        """ended: told when it starts no more, whatever became of it."""

        def end(outcome: str) -> None:
            if self.outcome is None:
                self.outcome = outcome
                if self._grant is not None:
                    self._grant.pool.left(self.instance_id, self._grant.board)
                self._loop.later(self._dice.delay_s(HOP_S), self._call.hung_up.set)
                ended()

        async def run() -> None:
            try:
                await self._run()
            except StokerError as error:
                end(error.code)
            else:
                end("")

        self.process.on_death(lambda: end("killed"))
        self._loop.spawn(self.process, run(), name=self.instance_id)

    async def _run(self) -> None:
        await asyncio.sleep(self._dice.delay_s(HOP_S))
        if self._door is None:
            raise LoadCancelled("nobody listens")
        self._door.connect(self._call)
        answer = await self._call.answer
        if isinstance(answer, StokerError):
            raise answer
        self._grant = answer
        answer.pool.opened(self.instance_id, answer.board)
        board = answer.board
        for position in range(len(board.table)):
            await self._ready(board, position)
            await self._compare(answer, position)
            if board.window:
                board.released = position + 1
                board.change()
        # Tensors of a load that lies in the pool whole are copied at the end, some of them.
        if not board.window:
            drawn_s = self._dice.delay_s(self._dice.choice(LINGERS_S))
            await asyncio.sleep(drawn_s if self.lingers_s is None else self.lingers_s)
            for position in range(len(board.table)):
                await self._compare(answer, position)

    async def _ready(self, board: Board, position: int) -> None:
        while position not in board.ready:
            if board.state is not State.LOADING:
                raise board.error or LoadCancelled()
            if self._call.lost.is_set():
                raise LoadCancelled
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await board.changed()
            except TimeoutError:
                continue

    async def _compare(self, grant: Grant, position: int) -> None:
        """Slowly, so that what is written to meanwhile is seen."""
        expected = self.contents.shards[position]
        view = grant.pool.view(grant.board.table[position], len(expected))
        half = len(expected) // 2
        right = view[:half] == expected[:half]
        await asyncio.sleep(self._dice.delay_s(READ_S))
        right = right and view[half:] == expected[half:]
        self._flaws.require(right, f"{self.instance_id} read wrong bytes of {self.contents.model_id} at {position}")
