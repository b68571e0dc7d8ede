from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.buses import eventually

from stoker_bus.memory import MemoryBroker, MemoryBus
from stoker_bus.port import Message, answer
from stoker_contracts import subjects
from stoker_contracts.codec import decode, encode
from stoker_contracts.control import Failed, HeldModel, Locate, Located, StoreStatus
from stoker_contracts.events import TIER_PEER_SUSPECTED
from stoker_contracts.models import Tier
from stoker_core.clock import ManualClock
from stoker_core.errors import DatabaseUnavailable, InvalidSettings
from stoker_storeagent.peers.client import ASKED_MAX, PeerClient
from stoker_storeagent.throttle import Throttle


class Emitted:
    def __init__(self) -> None:
        self.events: list[tuple[tuple[str, str], str, dict[str, Any]]] = []

    def emit(self, event: tuple[str, str], subject: str, **data: Any) -> None:
        self.events.append((event, subject, data))


class Rig:
    """A client on a bus with nodes that answer as they are told."""

    def __init__(self) -> None:
        self.clock, self.broker, self.events = ManualClock(start_s=1000), MemoryBroker(), Emitted()
        self.bus = self.broker.connect()
        self.placed: list[str] | Exception = []
        self.asked: list[str] = []
        self.client = PeerClient(
            self.bus,
            self.placements,
            self.events,
            node="me",
            token="token",
            throttle=Throttle(0, self.clock),
            clock=self.clock,
        )
        self.part = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self.client.part().run()

    async def placements(self, model_id: str) -> list[str]:
        if isinstance(self.placed, Exception):
            raise self.placed
        return self.placed

    async def node(self, name: str, reply: Located | Failed | None, *, says: bool = True) -> None:
        """It answers so (None: never), and says on the bus that it holds the model."""

        async def locate(message: Message) -> None:
            asked: Locate = decode(Locate, message.data)
            assert (asked.model_id, asked.node) == ("m", "me")
            self.asked.append(name)
            if reply is not None:
                await answer(self.bus, message, reply)

        await self.bus.subscribe(subjects.store_locate(name), locate)
        if says:
            held = (HeldModel(model_id="m", tier=Tier.DRAM, held_bytes=50, total_bytes=100),)
            self.client.hear(StoreStatus(node=name, boot_id="boot", seq=1, tiers=(), held=held, address=f"{name}:7000"))

    async def located(self) -> list[str]:
        return [found.node for found in await self.client.locate("m")]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    rig.part.cancel()
    await asyncio.wait([rig.part])
    await rig.bus.close()


def at(node: str, held_bytes: int = 50, **more: Any) -> Located:
    return Located(node=node, address=f"{node}:7000", held_bytes=held_bytes, total_bytes=100, **more)


async def test_those_who_have_some_or_are_getting_it_are_located_by_node(rig: Rig) -> None:
    await rig.node("c", at("c"))
    await rig.node("a", at("a", 0, receiving=True))
    await rig.node("b", at("b", 0))
    assert await rig.client.locate("m") == [at("a", 0, receiving=True), at("c")]


async def test_what_nodes_say_on_the_bus_is_heard(rig: Rig) -> None:
    await rig.node("a", at("a"), says=False)
    held = (HeldModel(model_id="m", tier=Tier.SSD, held_bytes=50, total_bytes=100),)
    said = StoreStatus(node="a", boot_id="boot", seq=1, tiers=(), held=held, address="a:7000")
    await eventually(lambda: bool(rig.broker.subscriptions_of(rig.bus)))
    await rig.bus.publish(subjects.status_store("a"), encode(said))
    async with asyncio.timeout(5):
        while await rig.located() != ["a"]:
            await asyncio.sleep(0.001)


async def test_the_database_names_further_nodes(rig: Rig) -> None:
    rig.placed = ["a", "me", "nobody"]
    await rig.node("a", at("a"), says=False)
    assert await rig.located() == ["a"]


async def test_without_the_database_those_who_were_heard_are_enough(rig: Rig) -> None:
    rig.placed = DatabaseUnavailable()
    await rig.node("a", at("a"))
    assert await rig.located() == ["a"]


async def test_errors_and_nonsense_and_silence_leave_a_node_out_and_the_others_in(rig: Rig) -> None:
    await rig.node("a", at("a"))
    await rig.node("b", Failed(code="internal", message="no"))
    await rig.node("c", at("z"))  # another node's answer
    await rig.node("d", Located(node="d", address="", held_bytes=50, total_bytes=100))
    await rig.node("e", None)
    assert await rig.located() == ["a"]
    assert sorted(rig.asked) == ["a", "b", "c", "d", "e"]


async def test_without_the_bus_nobody_is_located(rig: Rig) -> None:
    await rig.node("a", at("a"))
    rig.broker.disconnect(rig.bus)
    assert await rig.located() == []


async def test_where_nobody_has_a_model_nobody_is_asked(rig: Rig) -> None:
    assert await rig.located() == []
    assert rig.asked == []


async def test_so_many_are_asked_at_most(rig: Rig) -> None:
    for number in range(ASKED_MAX + 5):
        await rig.node(f"n{number}", at(f"n{number}"))
    assert len(await rig.located()) == ASKED_MAX
    assert len(rig.asked) == ASKED_MAX


async def test_a_suspect_is_not_asked_until_its_time_is_over(rig: Rig) -> None:
    await rig.node("a", at("a"))
    await rig.node("b", at("b"))
    rig.client.suspect("a", "wrong bytes")
    assert rig.client.suspected == {"a"}
    assert await rig.located() == ["b"]
    assert rig.asked == ["b"]
    rig.clock.advance(60)
    held = (HeldModel(model_id="m", tier=Tier.DRAM, held_bytes=50, total_bytes=100),)
    rig.client.hear(StoreStatus(node="a", boot_id="boot", seq=2, tiers=(), held=held, address="a:7000"))
    assert rig.client.suspected == frozenset()
    assert await rig.located() == ["a"]


async def test_a_suspicion_is_told_once_and_lasts_from_the_last_reason_on(rig: Rig) -> None:
    rig.client.suspect("a", "wrong bytes")
    rig.clock.advance(50)
    rig.client.suspect("a", "wrong bytes again")
    rig.clock.advance(50)
    assert rig.client.suspected == {"a"}
    [(event, subject, data)] = rig.events.events
    assert (event, subject, data["reason"], data["by"]) == (TIER_PEER_SUSPECTED, "a", "wrong bytes", "me")


async def test_who_becomes_a_suspect_while_it_answers_is_not_located(rig: Rig) -> None:
    class Suspecting(MemoryBus):
        async def request(self, *arguments: Any, **more: Any) -> Message:
            reply = await super().request(*arguments, **more)
            rig.client.suspect("a", "wrong bytes")
            return reply

    await rig.node("a", at("a"))
    rig.client._bus = Suspecting(rig.broker)
    assert await rig.located() == []


def test_without_a_token_there_are_no_peers() -> None:
    clock = ManualClock()

    async def placements(model_id: str) -> list[str]:
        return []

    with pytest.raises(InvalidSettings):
        PeerClient(
            MemoryBroker().connect(),
            placements,
            Emitted(),
            node="me",
            token="",
            throttle=Throttle(0, clock),
            clock=clock,
        )
