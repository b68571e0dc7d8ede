"""Several instances of one model, and how long the last one stays."""

from __future__ import annotations

import pytest
from tests.support.fake_worker import model_spec
from tests.unit.policy.clusters import Facts, demand, instance, node

from stoker_policy import Cluster, Decided, Start, Stop, decide

MANY = model_spec("a", max_replicas=4, slots=4)


def cluster(*instances: object, **fields: object) -> Cluster:
    facts = Facts(nodes=(node(slots=6),), models=(MANY,), instances=instances, **fields)  # type: ignore[arg-type]
    return facts.cluster()


def starts(decided: Decided) -> list[tuple[int, ...]]:
    return [c.devices for c in decided.commands if isinstance(c, Start)]


def test_a_long_queue_starts_as_many_instances_as_it_fills() -> None:
    decided = decide(cluster(demands=(demand("a", queued=11),)))
    assert starts(decided) == [(0,), (1,), (2,)]
    assert [d.chosen for d in decided.placements] == [0, 0, 0]


def test_no_more_than_the_model_may_have_and_only_those_that_it_lacks() -> None:
    there = instance("i1", "a", devices=(0,), running=4)
    known = cluster(there, demands=(demand("a", queued=99),))
    for second in range(10):
        known.now_ms = second * 1000
        known.put_instance(there)
        decided = decide(known)
    assert len(starts(decided)) == MANY.max_replicas - 1  # somebody waits all the time
    known.put_instance(instance("i2", "a", devices=(1,), running=4))
    known.now_ms += 1000
    assert len(starts(decide(known))) <= 2


def test_a_model_that_must_have_instances_gets_them_without_demand_and_keeps_them() -> None:
    kept = model_spec("a", min_replicas=2, max_replicas=2, keep_alive_s=1.0)
    facts = Facts(nodes=(node(slots=3),), models=(kept,))
    assert len(starts(decide(facts.cluster()))) == 2
    idle = tuple(instance(f"i{n}", "a", devices=(n,), idle_ms=99_000) for n in range(3))
    known = Facts(nodes=(node(slots=3),), models=(kept,), instances=idle).cluster()
    stops = [c for c in decide(known).commands if isinstance(c, Stop)]
    assert [s.instance_id for s in stops] == ["i2"]


def test_those_that_the_load_does_not_need_end_once_they_idle_and_the_last_one_stays_for_its_keep_alive() -> None:
    known = cluster()
    for second in range(70):
        known.now_ms = second * 1000
        for number in range(3):
            known.put_instance(instance(f"i{number}", "a", devices=(number,), idle_ms=1000 + number))
        decided = decide(known)
        stops = [c for c in decided.commands if isinstance(c, Stop)]
        assert second >= 60 or not stops
    assert [s.instance_id for s in stops] == ["i1", "i2"]
    assert all(s.only_if_idle and "more than its load needs" in s.reason for s in stops)


@pytest.mark.parametrize(("idle_ms", "ends"), [(20_000, False), (40_000, True)])
def test_a_learned_keep_alive_takes_the_place_of_the_model_s_own(idle_ms: int, ends: bool) -> None:
    learned = model_spec("a", keep_alive_auto=True, keep_alive_s=3600.0)
    known = Facts(nodes=(node(),), models=(learned,)).cluster()
    for _ in range(100):
        known.idle_times.observe("a", 1.0)
        known.idle_times.observe("a", 20.0)
    known.put_instance(instance("i1", "a", idle_ms=idle_ms))
    assert any(isinstance(c, Stop) for c in decide(known).commands) == ends
    assert (
        decide(
            Facts(nodes=(node(),), models=(learned,), instances=(instance("i1", "a", idle_ms=40_000),)).cluster()
        ).commands
        == []
    )
