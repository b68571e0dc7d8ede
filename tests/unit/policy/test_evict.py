"""Who leaves a full tier."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from stoker_policy import Candidate, choose_victims

many = settings(max_examples=200, deadline=None)
seconds = st.one_of(st.floats(0, 1e6), st.sampled_from((0.0, 1.0, 60.0, 3600.0)))


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    keys = draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
    return [
        Candidate(key=key, size_bytes=draw(st.integers(0, 20)), refetch_s=draw(seconds), idle_s=draw(seconds))
        for key in keys
    ]


needs = st.integers(-1, 100)


def a(key: str, size_bytes: int = 10, refetch_s: float = 1.0, idle_s: float = 0.0) -> Candidate:
    return Candidate(key=key, size_bytes=size_bytes, refetch_s=refetch_s, idle_s=idle_s)


def test_the_longest_idle_leaves_first() -> None:
    assert choose_victims([a("x", idle_s=5), a("y", idle_s=500), a("z", idle_s=50)], 10) == ("y",)


def test_what_is_dear_to_refetch_stays_for_longer() -> None:
    assert choose_victims([a("remote", refetch_s=100, idle_s=500), a("peer", refetch_s=1, idle_s=50)], 10) == ("peer",)


def test_of_equals_the_first_key_leaves() -> None:
    assert choose_victims([a("y"), a("x")], 1) == ("x",)


def test_nothing_leaves_where_no_room_is_needed() -> None:
    assert choose_victims([a("x")], 0) == ()
    assert choose_victims([], 0) == ()


def test_too_little_is_none() -> None:
    assert choose_victims([a("x"), a("y")], 21) is None
    assert choose_victims([a("x"), a("y")], 20) == ("x", "y")


def test_small_ones_stay_if_a_large_one_has_to_leave_anyway() -> None:
    assert choose_victims([a("small", 1, 0.1), a("large", 10, 100)], 10) == ("large",)


def test_of_two_that_became_unnecessary_the_dearer_one_stays() -> None:
    cheap, dear, large = a("cheap", 2, 0.1), a("dear", 2, 1.0), a("large", 10, 100)
    assert choose_victims([cheap, dear, large], 12) == ("cheap", "large")


@many
@given(candidates(), needs)
def test_victims_cover_the_need_and_none_of_them_is_unnecessary(known: list[Candidate], need_bytes: int) -> None:
    sizes = {c.key: c.size_bytes for c in known}
    victims = choose_victims(known, need_bytes)
    if victims is None:
        assert sum(sizes.values()) < need_bytes
        return
    freed = sum(sizes[key] for key in victims)
    assert freed >= need_bytes
    assert all(freed - sizes[key] < need_bytes for key in victims)
    assert len(set(victims)) == len(victims)


@many
@given(candidates(), needs, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_means_nothing(known: list[Candidate], need_bytes: int, chance: object) -> None:
    shuffled = list(known)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_victims(shuffled, need_bytes) == choose_victims(known, need_bytes)


@many
@given(candidates(), needs, seconds, st.data())
def test_being_idle_for_longer_saves_nobody(
    known: list[Candidate], need_bytes: int, more_s: float, data: st.DataObject
) -> None:
    victims = choose_victims(known, need_bytes)
    if victims:
        key = data.draw(st.sampled_from(victims))
        older = [replace(c, idle_s=c.idle_s + more_s) if c.key == key else c for c in known]
        assert key in (choose_victims(older, need_bytes) or ())


@many
@given(candidates(), needs, seconds, st.data())
def test_being_dearer_to_refetch_condemns_nobody(
    known: list[Candidate], need_bytes: int, more_s: float, data: st.DataObject
) -> None:
    victims = choose_victims(known, need_bytes)
    kept = [c.key for c in known if victims is not None and c.key not in victims]
    if kept:
        key = data.draw(st.sampled_from(kept))
        dearer = [replace(c, refetch_s=c.refetch_s + more_s) if c.key == key else c for c in known]
        assert key not in (choose_victims(dearer, need_bytes) or ())
