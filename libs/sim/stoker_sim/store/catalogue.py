"""The database, at a distance."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

from stoker_core.clock import Clock
from stoker_db.memory import MemoryDatabase
from stoker_db.ports import Database
from stoker_sim.dice import Dice
from stoker_sim.loop import crash_point
from stoker_sim.store.contents import Contents, Library

CALL_S = 0.003


class Registry:
    """Which models are deployed. `database` is what everybody shares; each run of an agent has its own `line` to it."""

    def __init__(self, library: Library, clock: Clock) -> None:
        self.library = library
        self.database = MemoryDatabase(clock)
        self.deployed: list[str] = []

    async def deploy(self, contents: Contents) -> None:
        await self.database.models.add(contents.spec, contents.files(), contents.manifest())
        self.deployed.append(contents.model_id)

    async def delete(self, model_id: str) -> None:
        self.deployed.remove(model_id)
        await self.database.models.delete(self.library.by_id[model_id].spec.name)

    def away(self, away: bool) -> None:
        if away:
            self.database.go_down()
        else:
            self.database.come_up()

    def line(self, dice: Dice) -> Database:
        return cast(Database, _Line(self.database, dice))


class _Line:
    """The repositories that a storage agent uses, each call with its delays."""

    def __init__(self, database: MemoryDatabase, dice: Dice) -> None:
        self.models = _Far(database.models, dice)
        self.tiers = _Far(database.tiers, dice)


class _Far:
    def __init__(self, near: object, dice: Dice) -> None:
        self._near, self._dice = near, dice

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method: Callable[..., Awaitable[Any]] = getattr(self._near, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(self._dice.delay_s(CALL_S))
            crash_point()
            found = await method(*args, **kwargs)
            await asyncio.sleep(self._dice.delay_s(CALL_S))
            return found

        return call
