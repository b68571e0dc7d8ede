"""News in any order, and what the leader makes of them."""

from __future__ import annotations

from tests.support.fake_worker import cpu_slots, model_spec

from stoker_contracts.control import Demand, InstanceStatus, WorkerStatus
from stoker_contracts.models import InstanceState
from stoker_db.ports import InstanceRow
from stoker_scheduler.demand import ENTRIES_MAX, Demands
from stoker_scheduler.state import State
from stoker_scheduler.view import cluster

READY, STARTING, FAILED = InstanceState.READY, InstanceState.STARTING, InstanceState.FAILED


def state() -> State:
    state = State(term=3, led_s=0.0)
    state.load([model_spec("a")], [], [])
    return state


def status(seq: int, *instances: tuple[str, InstanceState], boot_id: str = "b1", term: int = 3) -> WorkerStatus:
    return WorkerStatus(
        node="n1",
        boot_id=boot_id,
        seq=seq,
        term=term,
        devices=cpu_slots(1),
        zygote_ready=True,
        instances=tuple(
            InstanceStatus(instance_id=i, model_id="a", model="a", state=s, devices=(0,)) for i, s in instances
        ),
    )


def row(instance_id: str = "i1", boot_id: str = "b1") -> InstanceRow:
    return InstanceRow(
        instance_id=instance_id,
        model_id="a",
        node="n1",
        boot_id=boot_id,
        devices=(0,),
        desired=READY,
        actual=STARTING,
        term=3,
    )


def demand(queued: int = 1, gateway_id: str = "g1", oldest_wait_ms: int = 0) -> Demand:
    return Demand(gateway_id=gateway_id, model_id="a", queued=queued, oldest_wait_ms=oldest_wait_ms)


def test_an_older_status_of_the_same_boot_is_dropped() -> None:
    s = state()
    assert s.apply_status(status(5, ("i1", READY)), 1.0)
    assert not s.apply_status(status(4), 2.0)
    assert not s.apply_status(status(5), 2.0)
    assert s.instances["i1"].state is READY


def test_a_late_status_of_an_earlier_boot_is_dropped() -> None:
    s = state()
    s.apply_status(status(900), 1.0)
    s.apply_status(status(1, ("i2", READY), boot_id="b2"), 2.0)
    assert not s.apply_status(status(901, ("i1", READY)), 3.0)
    assert set(s.instances) == {"i2"}


def test_a_node_is_usable_only_after_it_answered_this_term() -> None:
    s = state()
    s.apply_status(status(1, term=2), 1.0)
    assert not s.nodes["n1"].answered
    assert s.unannounced() == ["n1"]
    s.apply_status(status(2, term=3), 1.0)
    assert s.nodes["n1"].answered
    assert s.unannounced() == []


def test_a_higher_term_supersedes() -> None:
    s = state()
    s.apply_status(status(1, term=4), 1.0)
    assert s.superseded_by == 4


def test_a_reservation_holds_its_device_until_the_status_shows_it() -> None:
    s = state()
    s.apply_status(status(1), 1.0)
    s.reserve(row(), 121.0)
    s.apply_status(status(2), 2.0)  # sent before the worker heard of it
    [view] = cluster(s, 2.0, prepare_again_s=60).instances.values()
    assert (view.state, view.gpu_bytes) == (STARTING, model_spec("a").gpu_bytes)
    s.apply_status(status(3, ("i1", STARTING)), 3.0)
    s.apply_status(status(4), 4.0)
    assert cluster(s, 4.0, prepare_again_s=60).instances == {}


def test_a_reservation_ends_with_its_budget_and_counts_as_a_failed_start() -> None:
    s = state()
    s.apply_status(status(1), 1.0)
    s.reserve(row(), 121.0)
    s.expire(120.9)
    assert len(cluster(s, 120.9, prepare_again_s=60).instances) == 1
    s.expire(121.0)
    seen = cluster(s, 123.0, prepare_again_s=60)
    assert seen.instances == {}
    assert [(f.in_row, f.since_ms) for f in seen.failures.values()] == [(1, 2000)]


def test_a_failure_that_is_both_answered_and_reported_counts_once() -> None:
    for answered_first in (True, False):
        s = state()
        s.apply_status(status(1), 1.0)
        s.reserve(row(), 121.0)
        if answered_first:
            s.start_failed("i1", "engine_failed", 2.0, counts=True)
        s.apply_status(status(2, ("i1", FAILED)), 2.0)
        s.start_failed("i1", "engine_failed", 2.0, counts=True)
        assert s.failures["a"].in_row == 1


def test_a_crash_after_ready_is_no_failed_start() -> None:
    s = state()
    s.apply_status(status(1, ("i1", READY)), 1.0)
    s.apply_status(status(2, ("i1", FAILED)), 2.0)
    assert s.failures == {}


def test_an_ended_instance_that_is_still_listed_is_not_taken_up_again() -> None:
    s = state()
    s.apply_status(status(1, ("i1", FAILED), ("i2", InstanceState.STOPPED)), 1.0)
    assert s.instances == {}


def test_a_new_boot_ends_the_instances_and_reservations_of_the_old_one() -> None:
    s = state()
    s.apply_status(status(1, ("i1", READY)), 1.0)
    s.reserve(row("i2"), 121.0)
    s.apply_status(status(1, boot_id="b2"), 2.0)
    assert {t.gone for t in s.instances.values()} == {"its node restarted"}


def test_deleted_models_keep_their_memory_while_their_instances_live() -> None:
    s = state()
    s.apply_status(status(1, ("i1", READY)), 1.0)
    s.set_models([])
    assert cluster(s, 1.0, prepare_again_s=60).instances["i1"].gpu_bytes == model_spec("a").gpu_bytes


def test_demand_is_valid_for_two_seconds_and_an_empty_queue_ends_it() -> None:
    demands = Demands()
    demands.apply(demand(), 0.0)
    demands.expire(1.9)
    assert demands.views(1.9)
    demands.expire(2.0)
    assert demands.views(2.0) == ()
    demands.apply(demand(), 3.0)
    demands.apply(demand(0), 3.1)
    assert demands.views(3.1) == ()


def test_demand_of_all_gateways_adds_up_and_ages() -> None:
    demands = Demands()
    demands.apply(demand(2, "g1", 100), 0.0)
    demands.apply(demand(3, "g2", 700), 1.0)
    [view] = demands.views(1.5)
    assert (view.queued, view.oldest_wait_ms) == (5, 1600)


def test_a_model_is_wanted_since_its_demand_last_began() -> None:
    demands = Demands()
    demands.apply(demand(), 1.0)
    demands.apply(demand(), 2.5)
    demands.expire(2.5)
    assert demands.first_seen_s("a") == 1.0
    demands.expire(5.0)
    assert demands.first_seen_s("a") is None
    demands.apply(demand(), 6.0)
    assert demands.first_seen_s("a") == 6.0


def test_demand_is_bounded() -> None:
    demands = Demands()
    assert all(demands.apply(demand(gateway_id=f"g{n}"), 0.0) for n in range(ENTRIES_MAX))
    assert not demands.apply(demand(gateway_id="one more"), 0.0)
    assert demands.apply(demand(7, gateway_id="g0"), 0.0)
