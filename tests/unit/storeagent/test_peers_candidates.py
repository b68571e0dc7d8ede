from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from stoker_contracts.control import SILENCE_LIMIT_S, HeldModel, StoreStatus
from stoker_contracts.models import Tier
from stoker_core.clock import ManualClock
from stoker_storeagent.peers.candidates import NODES_MAX, Heard
from stoker_storeagent.peers.complaints import ADDRESSES_MAX, AGAIN_S, Complaints
from stoker_storeagent.peers.usage import LINGER_S, Usage


def status(
    node: str, *held: tuple[str, int], seq: int = 1, boot_id: str = "boot-1", address: str = "h:1"
) -> StoreStatus:
    return StoreStatus(
        node=node,
        boot_id=boot_id,
        seq=seq,
        tiers=(),
        held=tuple(
            HeldModel(model_id=model_id, tier=Tier.SSD, held_bytes=size, total_bytes=100) for model_id, size in held
        ),
        address=address,
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(start_s=1000)


@pytest.fixture
def heard(clock: ManualClock) -> Heard:
    return Heard(clock, node="me")


def test_those_who_have_most_come_first_and_the_database_is_asked_last(heard: Heard) -> None:
    heard.offer(status("a", ("m", 10)))
    heard.offer(status("b", ("m", 100)))
    heard.offer(status("c", ("other", 100)))
    heard.offer(status("d", ("m", 0)))  # it has just begun
    assert heard.candidates("m", ["b", "e"]) == ["b", "a", "d", "e"]


def test_what_is_in_two_tiers_counts_once(heard: Heard) -> None:
    both = status("a", ("m", 10), ("m", 60))
    heard.offer(both)
    heard.offer(status("b", ("m", 65)))
    assert heard.candidates("m", []) == ["b", "a"]


def test_the_node_itself_is_no_candidate(heard: Heard) -> None:
    heard.offer(status("me", ("m", 100)))
    assert heard.candidates("m", ["me"]) == []


def test_a_node_that_serves_none_is_no_candidate_wherever_its_name_comes_from(heard: Heard) -> None:
    heard.offer(status("a", ("m", 100), address=""))
    assert heard.candidates("m", ["a"]) == []


def test_a_silent_node_is_a_candidate_only_by_the_database(heard: Heard, clock: ManualClock) -> None:
    heard.offer(status("a", ("m", 100)))
    clock.advance(SILENCE_LIMIT_S + 0.1)
    assert heard.candidates("m", []) == []
    assert heard.candidates("m", ["a"]) == ["a"]


def test_the_newest_status_counts_also_after_a_new_start(heard: Heard) -> None:
    heard.offer(status("a", ("m", 100), seq=5))
    heard.offer(status("a", seq=4))
    assert heard.candidates("m", []) == ["a"]
    heard.offer(status("a", seq=6))
    assert heard.candidates("m", []) == []
    heard.offer(status("a", ("m", 100), seq=1, boot_id="boot-2"))
    assert heard.candidates("m", []) == ["a"]


def test_among_equals_nodes_do_not_all_ask_in_the_same_order() -> None:
    names, firsts = [f"n{number}" for number in range(20)], set()
    for me in names:
        heard = Heard(ManualClock(start_s=1000), node=me)
        for name in names:
            heard.offer(status(name, ("m", 100)))
        order = heard.candidates("m", [])
        assert sorted(order) == sorted(set(names) - {me})
        firsts.add(order[0])
    assert len(firsts) > 5


def test_the_number_of_nodes_is_bounded(heard: Heard, clock: ManualClock) -> None:
    heard.offer(status("first", ("m", 1)))
    clock.advance(0.1)
    for number in range(NODES_MAX):
        heard.offer(status(f"n{number}"))
    assert heard.candidates("m", []) == []


def test_a_peer_is_served_while_it_takes_and_a_moment_longer(clock: ManualClock) -> None:
    usage = Usage(clock)
    with usage.taking("m", "a"):
        clock.advance(100)
        assert usage.serving == 1
    clock.advance(LINGER_S / 2)
    assert usage.serving == 1
    clock.advance(LINGER_S / 2)
    assert usage.serving == 0


def test_a_nodes_connections_count_once_and_each_of_its_models(clock: ManualClock) -> None:
    usage = Usage(clock)
    with usage.taking("m", "a"), usage.taking("m", "a"), usage.taking("other", "a"), usage.taking("m", "b"):
        assert usage.serving == 3


async def test_nothing_is_in_hand_once_the_last_is_done(clock: ManualClock) -> None:
    usage = Usage(clock)
    await asyncio.wait_for(usage.idle(), 1)
    with usage.taking("m", "b"):
        with usage.taking("m", "a"):
            waiting = asyncio.create_task(usage.idle())
        await asyncio.sleep(0)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 1)


def test_one_address_is_complained_of_once_a_minute(clock: ManualClock) -> None:
    complaints = Complaints(clock)
    with capture_logs() as lines:
        for _ in range(3):
            complaints.about("10.0.0.1", "garbage")
        complaints.about("10.0.0.2", "garbage")
        clock.advance(AGAIN_S)
        complaints.about("10.0.0.1", "garbage")
    assert [line["address"] for line in lines] == ["10.0.0.1", "10.0.0.2", "10.0.0.1"]


def test_the_addresses_that_are_remembered_are_bounded(clock: ManualClock) -> None:
    complaints = Complaints(clock)
    with capture_logs() as lines:
        for number in range(2 * ADDRESSES_MAX):
            complaints.about(f"10.0.{number}", "garbage")
        complaints.about("10.0.0", "garbage")
    assert len(lines) == 2 * ADDRESSES_MAX + 1
