"""Keeps the storage agent's pool alive while the agent is not: two descriptors, and who may still read from it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from stoker_contracts.codec import Contract, decode, encode
from stoker_contracts.keeping import (
    DESCRIPTORS,
    HELLO_S,
    LINE_LIMIT_BYTES,
    Drop,
    Keep,
    KeeperHello,
    Keeping,
    Kept,
    Loaded,
    ToKeeper,
)
from stoker_core.errors import InvalidMessage, StokerError
from stoker_core.logging import get_logger
from stoker_core.runner import Part
from stoker_core.unix import Connection, accept, close

log = get_logger("keeper")

CONNECTIONS_MAX = 4
"""One agent has one; the others are agents of before whose end was not seen yet, or no agents."""
SEND_S = 5.0


@dataclass(eq=False)
class _Agent:
    """loading: instances that it believes to be starting.  changed: set when one may not be any more."""

    boot_id: str
    connection: Connection
    task: asyncio.Task[None]
    loading: set[str]
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def say(self, message: Contract, descriptors: tuple[int, ...] = ()) -> None:
        """Raises TimeoutError if it does not read."""
        async with asyncio.timeout(SEND_S), self.sending:
            await self.connection.send(encode(message), descriptors)


class PoolKeeper:
    """At most one agent is current, and two descriptors are kept at most. `part` must run; then `close`."""

    def __init__(self, listener: socket.socket, starting: Callable[[], Iterable[str]]) -> None:
        """listener: closed by `close`.  starting: ids of the instances that are starting now."""
        self._listener, self._starting = listener, starting
        self._kept: tuple[int, ...] = ()
        self._agent: _Agent | None = None
        self._open = 0

    def part(self) -> Part:
        return Part("keeper", self._run)

    def changed(self) -> None:
        """An instance may have ceased to start."""
        if self._agent is not None:
            self._agent.changed.set()

    def close(self) -> None:
        """Let go of all. The pool lives on with its agent."""
        close(self._listener)
        self._replace(())

    def _replace(self, descriptors: tuple[int, ...]) -> None:
        replaced, self._kept = self._kept, descriptors
        for descriptor in replaced:
            os.close(descriptor)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                accepted = await accept(self._listener)
                if self._open == CONNECTIONS_MAX:
                    log.warning("too_many_agents", connections=self._open)
                    accepted.close()
                    continue
                self._open += 1
                # Made here: a task that is cancelled before it began would not close it.
                connection = Connection(accepted, line_bytes_max=LINE_LIMIT_BYTES, descriptors_max=DESCRIPTORS)
                task = group.create_task(self._connection(connection), name="agent")
                task.add_done_callback(partial(self._closed, connection))

    def _closed(self, connection: Connection, _: asyncio.Task[None]) -> None:
        self._open -= 1
        connection.close()
        if self._agent is not None and self._agent.connection is connection:
            self._agent = None

    async def _connection(self, connection: Connection) -> None:
        try:
            await self._serve(connection)
        except* (StokerError, OSError) as errors:
            log.warning("agent_cut", errors=[str(error) or type(error).__name__ for error in errors.exceptions])

    async def _serve(self, connection: Connection) -> None:
        async with asyncio.timeout(HELLO_S):
            line = await connection.line()
        if not line:
            return
        hello: KeeperHello = decode(KeeperHello, line)
        agent = self._welcome(hello, connection)
        await agent.say(Kept(loading=tuple(sorted(agent.loading)), kept=bool(self._kept)), self._kept)
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(self._tell(agent), name="tell loaded")
            await self._obey(agent)
            telling.cancel()
        log.info("agent_left", boot_id=agent.boot_id, kept=bool(self._kept))

    def _welcome(self, hello: KeeperHello, connection: Connection) -> _Agent:
        task = asyncio.current_task()
        assert task is not None
        if self._agent is not None:
            log.warning("agent_replaced", boot_id=self._agent.boot_id)
            self._agent.task.cancel()
        self._agent = _Agent(hello.boot_id, connection, task, set(self._starting()))
        self._agent.changed.set()  # one may change before anybody waits for it
        log.info("agent_joined", boot_id=hello.boot_id, loading=len(self._agent.loading), kept=bool(self._kept))
        return self._agent

    async def _obey(self, agent: _Agent) -> None:
        """Until it leaves."""
        while line := await agent.connection.line():
            command: ToKeeper = decode(ToKeeper, line)
            descriptors = agent.connection.descriptors()
            expected = DESCRIPTORS if isinstance(command, Keep) else 0
            if len(descriptors) != expected:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise InvalidMessage(
                    f"{len(descriptors)} descriptors came with {type(command).__name__}, not {expected}"
                )
            self._replace(descriptors)
            log.info("pool_dropped" if isinstance(command, Drop) else "pool_kept", boot_id=agent.boot_id)
            await agent.say(Keeping())

    async def _tell(self, agent: _Agent) -> None:
        while agent.loading:
            await agent.changed.wait()
            agent.changed.clear()
            for instance_id in sorted(agent.loading - set(self._starting())):
                agent.loading.remove(instance_id)
                await agent.say(Loaded(instance_id=instance_id))
