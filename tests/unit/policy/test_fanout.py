"""Who takes a model from whom."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from stoker_policy import plan_fanout

many = settings(max_examples=200, deadline=None)
names = st.lists(st.sampled_from("abcdefgh"), unique=True)
links = st.dictionaries(
    st.tuples(st.sampled_from("abcdefghi"), st.sampled_from("abcdefghi")), st.sampled_from((0.0, 1.0, 2.0, 5.0))
)


def test_receivers_of_one_holder_chain_behind_it() -> None:
    assert plan_fanout(["h"], ["c", "a", "b"], {}) == {"a": ("h",), "b": ("a", "h"), "c": ("b", "h")}


def test_several_holders_head_chains_of_nearly_equal_length() -> None:
    assert plan_fanout(["g", "h"], ["a", "b", "c"], {}) == {
        "a": ("g", "h"),
        "b": ("h", "g"),
        "c": ("a", "g", "h"),
    }


def test_without_a_holder_the_first_goes_to_the_source_and_the_others_chain_behind_it() -> None:
    assert plan_fanout([], ["c", "a", "b"], {}) == {"a": (), "b": ("a",), "c": ("b",)}


def test_a_receiver_that_holds_it_already_needs_nobody_and_serves_others() -> None:
    assert plan_fanout(["a"], ["a", "b"], {}) == {"a": (), "b": ("a",)}


def test_the_fastest_stand_first() -> None:
    measured = {("a", "h"): 1.0, ("b", "h"): 3.0, ("x", "c"): 2.0}
    assert list(chain(plan_fanout(["h"], ["a", "b", "c"], measured), "h")) == ["b", "c", "a"]


def test_an_unknown_link_counts_as_the_median() -> None:
    measured = {("a", "x"): 1.0, ("b", "x"): 2.0, ("c", "x"): 3.0, ("n", "x"): 0.0}
    assert list(chain(plan_fanout(["h"], ["a", "c", "n"], measured), "h")) == ["c", "n", "a"]


def chain(plan: dict[str, tuple[str, ...]], head: str) -> list[str]:
    """The receivers behind `head`, in order."""
    found = [head]
    while after := [node for node, sources in plan.items() if sources[:1] == (found[-1],) and node not in found]:
        found += after[:1]
    return found[1:]


@many
@given(names, names, links)
def test_every_receiver_is_planned_and_nobody_waits_for_itself(
    holders: list[str], receivers: list[str], measured: dict[tuple[str, str], float]
) -> None:
    plan = plan_fanout(holders, receivers, measured)
    assert set(plan) == set(receivers)
    for node, sources in plan.items():
        assert node not in sources
        assert len(set(sources)) == len(sources)
        assert set(sources) <= {*holders, *receivers}
        if node in holders:
            assert sources == ()
        else:
            assert set(sources) >= set(holders)


@many
@given(names, names, links)
def test_nobody_waits_for_who_waits_for_it(
    holders: list[str], receivers: list[str], measured: dict[tuple[str, str], float]
) -> None:
    plan = plan_fanout(holders, receivers, measured)

    def upstream(node: str, seen: frozenset[str]) -> set[str]:
        assert node not in seen, "a circle"
        return {node}.union(*(upstream(source, seen | {node}) for source in plan.get(node, ())))

    for node in receivers:
        upstream(node, frozenset())


@many
@given(names, names, links)
def test_no_node_serves_two_as_their_first_choice_but_in_turn(
    holders: list[str], receivers: list[str], measured: dict[tuple[str, str], float]
) -> None:
    plan = plan_fanout(holders, receivers, measured)
    firsts = [sources[0] for sources in plan.values() if sources]
    assert len(set(firsts)) == len(firsts)
    lengths = [len(chain(plan, holder)) for holder in holders]
    if lengths:
        assert max(lengths) - min(lengths) <= 1
        assert sum(lengths) == len(set(receivers) - set(holders))


@many
@given(names, names, links, st.randoms(use_true_random=False))
def test_the_order_of_what_is_given_means_nothing(
    holders: list[str], receivers: list[str], measured: dict[tuple[str, str], float], chance: object
) -> None:
    def shuffled(values: list[str]) -> list[str]:
        values = list(values)
        chance.shuffle(values)  # type: ignore[attr-defined]
        return values

    assert plan_fanout(shuffled(holders), shuffled(receivers), measured) == plan_fanout(holders, receivers, measured)
