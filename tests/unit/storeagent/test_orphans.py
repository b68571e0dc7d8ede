from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stoker_storeagent.orphans import WORKER_GONE_S, Orphan, Orphans
from stoker_storeagent.table import ResidentRecord

INSTANCES = ("a", "b", "c", "d")


def record(model_id: str, *holders: str) -> ResidentRecord:
    return ResidentRecord(model_id=model_id, chunks=(), complete=True, holders=holders)


def test_who_leased_and_still_starts_holds_on_and_nobody_else():
    orphans = Orphans([record("m", "a", "b"), record("n", "b"), record("o")], loading=["b", "stranger"])
    assert orphans.holds == (Orphan(0, "b"), Orphan(1, "b"))


def test_a_hold_ends_once_with_its_instance_and_others_stay():
    orphans = Orphans([record("m", "a", "b"), record("n", "a")], loading=["a", "b"])
    assert orphans.loaded("a") == [Orphan(0, "a"), Orphan(1, "a")]
    assert orphans.loaded("a") == []
    assert orphans.loaded("b") == [Orphan(0, "b")]
    assert orphans.holds == ()


def test_a_lost_worker_takes_its_instances_along_after_a_while():
    orphans = Orphans([record("m", "a")], loading=["a"])
    assert orphans.expired(10**9) == []
    orphans.worker_lost(100.0)
    orphans.worker_lost(103.0)
    assert orphans.expired(100.0 + WORKER_GONE_S - 0.01) == []
    assert orphans.expired(100.0 + WORKER_GONE_S) == [Orphan(0, "a")]
    assert orphans.expired(100.0 + WORKER_GONE_S) == []


def test_a_worker_that_is_back_keeps_those_it_names_and_ends_the_others():
    orphans = Orphans([record("m", "a", "b")], loading=["a", "b"])
    orphans.worker_lost(100.0)
    assert orphans.worker_back(["b", "new"]) == [Orphan(0, "a")]
    assert orphans.expired(200.0) == []
    assert orphans.worker_back([]) == [Orphan(0, "b")]


def test_as_long_as_somebody_listens_the_worker_may_be_the_same_one():
    orphans = Orphans([record("m", "a")], loading=["a"])
    orphans.worker_lost(100.0)
    orphans.worker_seen()
    assert orphans.expired(200.0) == []
    orphans.worker_lost(201.0)
    assert orphans.expired(203.0) == []


def test_an_instance_that_holds_a_resident_twice_holds_it_once_here():
    orphans = Orphans([record("m", "a", "a")], loading=["a", "a"])
    assert orphans.holds == (Orphan(0, "a"),)


instances = st.sampled_from(INSTANCES)
some = st.lists(instances, unique=True)
steps = st.one_of(
    st.tuples(st.just("loaded"), instances),
    st.tuples(st.just("worker_back"), some),
    st.tuples(st.just("worker_lost"), st.none()),
    st.tuples(st.just("worker_seen"), st.none()),
    st.tuples(st.just("wait"), st.floats(0, 2 * WORKER_GONE_S)),
)


@given(holders=st.lists(some, max_size=4), loading=some, script=st.lists(steps, max_size=20))
def test_each_hold_ends_once_and_never_while_its_instance_may_read(
    holders: list[list[str]], loading: list[str], script: list[tuple[str, object]]
):
    records = [record(f"m{index}", *names) for index, names in enumerate(holders)]
    orphans = Orphans(records, loading)
    begun = list(orphans.holds)
    assert begun == [
        Orphan(index, name) for index, names in enumerate(holders) for name in sorted(set(names) & set(loading))
    ]
    may_read, ended, now_s, lost_s = set(loading), list[Orphan](), 0.0, None
    for step, argument in script:
        gone: list[Orphan] = []
        match step:
            case "loaded":
                may_read.discard(argument)  # type: ignore[arg-type]
                gone = orphans.loaded(argument)  # type: ignore[arg-type]
            case "worker_back":
                may_read &= set(argument)  # type: ignore[call-overload]
                lost_s = None
                gone = orphans.worker_back(argument)  # type: ignore[arg-type]
            case "worker_lost":
                lost_s = now_s if lost_s is None else lost_s
                orphans.worker_lost(now_s)
            case "worker_seen":
                lost_s = None
                orphans.worker_seen()
            case "wait":
                now_s += argument  # type: ignore[operator]
                if lost_s is not None and now_s >= lost_s + WORKER_GONE_S:
                    may_read.clear()
                gone = orphans.expired(now_s)
        assert gone == sorted(gone)
        ended += gone
        assert {hold.instance_id for hold in orphans.holds} <= may_read
        assert {hold.instance_id for hold in ended}.isdisjoint(may_read)
        assert sorted([*ended, *orphans.holds]) == sorted(begun)
