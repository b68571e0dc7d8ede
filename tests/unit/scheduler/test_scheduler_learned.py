"""What the leader learns from statuses, and what it makes of nonsense."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.support.fake_worker import GIB, cpu_slots, model_spec

from stoker_contracts.control import (
    HeldModel,
    InstanceStatus,
    LinkStatus,
    StoreStatus,
    TierStatus,
    WorkerStatus,
)
from stoker_contracts.models import InstanceState, StartPhases, Tier
from stoker_db.ports import InstanceRow
from stoker_policy import EngineState, LoadView
from stoker_scheduler.state import QUARANTINE_S, State
from stoker_scheduler.view import Mirror, cluster

READY, STARTING = InstanceState.READY, InstanceState.STARTING
A = model_spec("a")
LOAD = LoadView(source=Tier.SSD, origin="", size_bytes=GIB, wait_s=0.0, load_s=1.0)


def state() -> State:
    state = State(term=1, led_s=0.0)
    state.load([A], [], [])
    return state


def worker(seq: int, *instances: InstanceStatus, memory_bytes: int = 4 * GIB, node: str = "n1") -> WorkerStatus:
    devices = cpu_slots(1, memory_bytes)
    return WorkerStatus(
        node=node, boot_id="b", seq=seq, term=1, devices=devices, zygote_ready=True, instances=instances
    )


def store(seq: int, *held: HeldModel, bytes_per_s: float = 1e9) -> StoreStatus:
    tiers = (TierStatus(tier=Tier.SSD, capacity_bytes=GIB, used_bytes=0, read_bytes_per_s=bytes_per_s),)
    links = (LinkStatus(peer="n2", read_bytes_per_s=2e9),)
    return StoreStatus(node="n1", boot_id="b", seq=seq, tiers=tiers, held=held, links=links)


def status(instance_state: InstanceState, **fields: object) -> InstanceStatus:
    values: dict[str, object] = {"instance_id": "i1", "model_id": "a", "model": "a", "devices": (0,)}
    return InstanceStatus(state=instance_state, **(values | fields))  # type: ignore[arg-type]


def row() -> InstanceRow:
    return InstanceRow(
        instance_id="i1", model_id="a", node="n1", boot_id="b", devices=(0,), desired=READY, actual=STARTING, term=1
    )


def test_a_start_that_became_ready_is_learned_once() -> None:
    s = state()
    s.apply_status(worker(1), 0.0)
    prior = s.learned.estimates.engine_start("n1", A, EngineState.ZYGOTE)
    s.reserve(row(), 120.0, decided_s=0.0, load=LOAD, engine=EngineState.ZYGOTE)
    ready = status(READY, phases=StartPhases(load_ms=500, engine_ms=9000), load_source=Tier.SSD)
    for seq in (2, 3):
        s.apply_status(worker(seq, ready), float(seq))
    learned = s.learned.estimates.engine_start("n1", A, EngineState.ZYGOTE)
    assert learned.samples == 1
    assert learned.value > prior.value
    assert s.learned.estimates.bandwidth("n1", Tier.SSD).samples == 1


def test_what_agents_say_of_tiers_and_links_is_believed_where_nothing_was_seen() -> None:
    s = state()
    before = s.learned.estimates.bandwidth("n1", Tier.SSD).value
    s.apply_store(store(1, bytes_per_s=20e9), 0.0)
    assert s.learned.estimates.bandwidth("n1", Tier.SSD).value > before


@pytest.mark.parametrize("bytes_per_s", [-1.0, 1e18])
def test_a_node_whose_agent_reports_nonsense_is_left_alone_until_it_was_sensible_for_a_while(
    bytes_per_s: float,
) -> None:
    s = state()
    mirror = Mirror(s, prepare_again_s=60)
    s.apply_status(worker(1), 0.0)
    assert mirror.refresh(0.0).sites["n1"].usable
    s.apply_store(store(1, bytes_per_s=bytes_per_s), 1.0)
    assert not mirror.refresh(1.0).sites["n1"].usable
    assert "read_bytes_per_s" in s.nodes["n1"].absurd
    s.apply_store(store(2), 2.0)
    s.expire(1.0 + QUARANTINE_S - 0.1)
    assert not mirror.refresh(60.9).sites["n1"].usable
    s.expire(1.0 + QUARANTINE_S)
    assert mirror.refresh(61.0).sites["n1"].usable


def test_a_worker_that_reports_nonsense_keeps_what_was_known_of_it() -> None:
    s = state()
    s.apply_status(worker(1, status(READY)), 0.0)
    s.apply_status(worker(2, memory_bytes=-1), 1.0)
    seen = cluster(s, 1.0, prepare_again_s=60)
    assert set(seen.instances) == {"i1"}
    assert not seen.sites["n1"].usable
    assert seen.sites["n1"].slots[0].device.memory_bytes == 4 * GIB


def test_what_a_node_holds_is_mirrored_by_tier_and_forgotten_with_it() -> None:
    s = state()
    mirror = Mirror(s, prepare_again_s=60)
    s.apply_status(worker(1), 0.0)
    files_bytes = GIB - 10  # of a model whose weights are counted otherwise
    all_of_it = HeldModel(model_id="a", tier=Tier.SSD, held_bytes=files_bytes, total_bytes=files_bytes)
    part = replace(all_of_it, tier=Tier.DRAM, held_bytes=5)
    s.apply_store(store(1, all_of_it, part), 0.0)
    assert mirror.refresh(0.0).sites["n1"].model_bytes == {"a": (5, A.weight_bytes)}
    s.apply_store(store(2), 1.0)
    assert mirror.refresh(1.0).holders == {}


def test_an_idle_time_ends_with_the_next_demand_or_request() -> None:
    s = state()
    s.apply_status(worker(1, status(READY, idle_ms=1000)), 10.0)  # idle since 9
    s.apply_status(worker(2, status(READY, running=1)), 39.0)
    s.apply_status(worker(3, status(READY, idle_ms=0)), 40.0)
    s.apply_status(worker(4), 50.0)  # it ended
    s.learned.busy("a", 70.0)
    assert s.learned.idle_times.dump() == {"a": [30_000, 30_000]}


def test_a_request_between_two_statuses_ends_an_idle_time_too() -> None:
    s = state()
    s.apply_status(worker(1, status(READY, idle_ms=0)), 10.0)
    s.apply_status(worker(2, status(READY, idle_ms=500)), 30.5)
    assert s.learned.idle_times.dump() == {"a": [20_000]}


def test_a_mirror_that_is_kept_up_to_date_is_as_one_made_anew() -> None:
    s = state()
    mirror = Mirror(s, prepare_again_s=60)
    mirror.refresh(0.0)
    s.apply_status(worker(1), 1.0)
    s.reserve(row(), 120.0, decided_s=1.0, load=LOAD, engine=EngineState.ZYGOTE)
    mirror.refresh(1.5)
    s.apply_status(worker(2, status(READY, idle_ms=10)), 2.0)
    s.stop_asked("i1", 2.5)
    s.prepare_asked("n1", "LlamaForCausalLM", 2.5)
    kept, anew = mirror.refresh(3.0), cluster(s, 3.0, prepare_again_s=60)
    assert (kept.instances, kept.models, kept.sites["n1"].view) == (anew.instances, anew.models, anew.sites["n1"].view)
    s.set_models([])
    s.apply_status(worker(3), 4.0)
    assert (mirror.refresh(4.0).instances, mirror.refresh(4.0).models) == ({}, {})
