"""Which peers a node takes chunks from."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_contracts.control import Located
from stoker_policy import order_sources

many = settings(max_examples=200, deadline=None)


def peer(node: str, held_bytes: int = 100, **fields: object) -> Located:
    values: dict[str, object] = {"address": f"{node}:1", "total_bytes": 100}
    return Located(node=node, held_bytes=held_bytes, **(values | fields))  # type: ignore[arg-type]


def order(*located: Located, wanted: tuple[str, ...] = (), bandwidth: dict[str, float] | None = None) -> list[str]:
    return [found.node for found in order_sources("me", located, wanted, bandwidth or {})]


def test_the_wanted_come_first_in_their_order_and_the_others_after_them() -> None:
    busy = peer("c", serving=9)
    assert order(peer("a"), peer("b"), busy, peer("d"), wanted=("c", "gone", "b")) == ["c", "b", "a", "d"]


def test_a_receiver_that_serves_nobody_goes_before_a_holder_that_serves_somebody() -> None:
    assert order(peer("holds", serving=1), peer("receives", 10, receiving=True)) == ["receives", "holds"]


def test_among_equally_free_ones_the_faster_link_goes_first_and_an_unknown_one_counts_as_the_median() -> None:
    known = {"slow": 1.0, "fast": 9.0, "usual": 5.0, "new": 0.0}
    assert order(*map(peer, ("slow", "new", "fast")), bandwidth=known) == ["fast", "new", "slow"]


def test_among_equally_fast_ones_the_complete_goes_first_then_by_name() -> None:
    assert order(peer("a", 99, receiving=True), peer("c"), peer("b")) == ["b", "c", "a"]


def test_who_receives_from_the_node_itself_is_left_out_even_if_wanted() -> None:
    behind = peer("behind", 10, receiving=True, upstream=("other", "me"))
    assert order(behind, peer("me"), peer("a"), wanted=("behind", "me")) == ["a"]


def test_who_can_give_nothing_is_left_out() -> None:
    assert order(peer("empty", 0), peer("shut", address=""), peer("begins", 0, receiving=True)) == ["begins"]


located = st.lists(
    st.builds(
        Located,
        node=st.sampled_from("abcdef"),
        address=st.sampled_from(("", "x:1", "x:1")),
        held_bytes=st.sampled_from((0, 50, 100)),
        total_bytes=st.just(100),
        receiving=st.booleans(),
        upstream=st.lists(st.sampled_from("abcdefg"), max_size=2).map(tuple),
        serving=st.integers(0, 2),
    ),
    unique_by=lambda found: found.node,
)
bandwidths = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from((0.0, 1.0, 2.0)))


@many
@given(located, st.lists(st.sampled_from("abcdefg")), bandwidths, st.randoms(use_true_random=False))
def test_the_order_depends_on_facts_alone_and_nobody_is_invented_or_doubled(
    known: list[Located], wanted: list[str], bandwidth: dict[str, float], chance: object
) -> None:
    shuffled = list(known)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    found = order_sources("a", known, wanted, bandwidth)
    assert found == order_sources("a", shuffled, wanted, bandwidth)
    assert all(one in known and one.node != "a" and "a" not in one.upstream for one in found)
    assert len({one.node for one in found}) == len(found)
    chosen = [one.node for one in found if one.node in wanted]
    assert [one.node for one in found][: len(chosen)] == chosen
    assert chosen == sorted(chosen, key=wanted.index)
