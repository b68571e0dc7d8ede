"""Who is declared silent, and when nobody may be."""

from __future__ import annotations

import pytest

from stoker_scheduler.records import Node
from stoker_scheduler.silence import Silence


def nodes(*heard_s: float | None) -> list[Node]:
    return [Node(f"n{i}", heard_s=at) for i, at in enumerate(heard_s)]


def check(
    silence: Silence, known: list[Node], now_s: float, *, connected: bool = True, reconnects: int = 0
) -> list[str]:
    return [n.name for n in silence.check(known, now_s, connected=connected, reconnects=reconnects)]


@pytest.fixture
def silence() -> Silence:
    return Silence(limit_s=3.0, majority_limit_s=15.0, led_s=0.0)


def test_a_node_is_silent_after_three_seconds_and_is_told_once(silence: Silence) -> None:
    known = nodes(10.0, 13.0, 13.0)
    assert check(silence, known, 13.0) == []
    assert check(silence, known, 13.1) == ["n0"]
    assert check(silence, known, 13.2) == []


def test_silence_counts_only_from_when_the_own_link_came_back(silence: Silence) -> None:
    known = nodes(10.0, 40.0, 40.0)
    check(silence, known, 11.0)
    check(silence, known, 20.0, connected=False)
    check(silence, known, 38.0, reconnects=1)
    assert check(silence, known, 40.9, reconnects=1) == []
    assert check(silence, known, 41.1, reconnects=1) == ["n0"]


def test_a_link_that_was_lost_and_came_back_between_two_checks_counts_as_lost(silence: Silence) -> None:
    known = nodes(10.0, 14.0, 14.0)
    assert check(silence, known, 14.0, reconnects=1) == []


def test_if_over_half_fall_silent_at_once_none_is_declared(silence: Silence) -> None:
    # Cut off together at 10.0; their last statuses are spread over the second before.
    known = nodes(*(9.0 + n / 10 for n in range(10)))
    for now_s in (12.1, 12.5, 13.5, 60.0):
        assert check(silence, known, now_s) == []
        assert silence.majority


def test_half_of_the_nodes_is_not_over_half(silence: Silence) -> None:
    assert check(silence, nodes(10.0, 13.1), 13.2) == ["n0"]


def test_nodes_that_die_one_after_another_are_all_declared(silence: Silence) -> None:
    known = nodes(10.0, 20.0, 20.0, 20.0)
    assert check(silence, known, 20.0) == ["n0"]
    for node in known[2:]:
        node.heard_s = 30.0
    assert check(silence, known, 30.0) == ["n1"]


def test_a_new_leader_waits_one_limit_first() -> None:
    silence = Silence(limit_s=3.0, majority_limit_s=15.0, led_s=100.0)
    known = nodes(None, 102.0, 102.0)
    assert check(silence, known, 103.0) == []
    assert check(silence, known, 103.1) == ["n0"]


def test_nodes_never_heard_are_silent_even_if_they_are_most(silence: Silence) -> None:
    assert check(silence, nodes(None, None, None, 3.0), 3.5) == ["n0", "n1", "n2"]


def test_a_node_that_speaks_again_can_fall_silent_again(silence: Silence) -> None:
    known = nodes(10.0, 15.0, 15.0)
    assert check(silence, known, 15.0) == ["n0"]
    known[0].heard_s, known[0].silent = 16.0, False
    known[1].heard_s = known[2].heard_s = 20.0
    assert check(silence, known, 20.0) == ["n0"]


def watch(
    silence: Silence, known: list[Node], since_s: float, until_s: float, *, speaking: set[str]
) -> dict[str, float]:
    """Check four times a second, while some speak every second. Returns when each was declared silent."""
    declared: dict[str, float] = {}
    for quarter in range(round((until_s - since_s) * 4) + 1):
        now_s = since_s + quarter / 4
        for node in known:
            if node.name in speaking and quarter % 4 == 0:
                node.heard_s = now_s
        declared |= dict.fromkeys(check(silence, known, now_s), now_s)
    return declared


def test_most_nodes_are_declared_after_the_longer_limit_while_another_one_goes_on_speaking(silence: Silence) -> None:
    known = nodes(20.0, 20.5, 20.5)
    declared = watch(silence, known, 21.0, 40.0, speaking={"n2"})
    assert declared == {"n0": 35.25, "n1": 35.5}
    assert not silence.majority, "the others that speak are most again"


def test_one_status_after_a_long_cut_condemns_nobody(silence: Silence) -> None:
    """The bus came back behind the observer's own link: who is heard first says nothing of the others yet."""
    known = nodes(20.0, 20.1, 20.2)
    assert watch(silence, known, 21.0, 60.0, speaking=set()) == {}
    assert watch(silence, known, 60.0, 74.0, speaking={"n2"}) == {}
    assert set(watch(silence, known, 74.25, 76.0, speaking={"n2"})) == {"n0", "n1"}


def test_the_longer_limit_counts_from_when_the_own_link_came_back(silence: Silence) -> None:
    known = nodes(20.0, 20.0, 20.0)
    check(silence, known, 30.0, connected=False)
    assert set(watch(silence, known, 30.25, 44.75, speaking={"n2"})) == set()
    assert set(watch(silence, known, 45.0, 47.0, speaking={"n2"})) == {"n0", "n1"}
