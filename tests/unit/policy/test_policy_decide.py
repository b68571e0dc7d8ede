"""Decisions on small clusters, one rule at a time."""

from __future__ import annotations

import pytest
from tests.support.fake_worker import GIB, model_spec
from tests.unit.policy.clusters import NEED_BYTES, Facts, decide, demand, instance, node

from stoker_contracts.models import Device, DeviceKind, EngineKind, InstanceState
from stoker_policy import FailureView, HeldView, Prepare, Reject, Start, Stop
from stoker_policy.backoff import backoff_ms

A, B, C = (model_spec(name) for name in "abc")


def starts(cluster: Facts) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(c.model_id, c.node, c.devices) for c in decide(cluster) if isinstance(c, Start)]


def stops(cluster: Facts) -> list[str]:
    return [c.instance_id for c in decide(cluster) if isinstance(c, Stop)]


def test_a_demanded_model_starts_on_a_free_device() -> None:
    [command] = decide(Facts(nodes=(node(),), models=(A,), demands=(demand("a"),)))
    assert isinstance(command, Start)
    assert (command.model_id, command.node, command.devices) == ("a", "n1", (0,))
    assert str(NEED_BYTES) in command.reason


def test_nothing_starts_without_demand() -> None:
    assert decide(Facts(nodes=(node(),), models=(A,), demands=(demand("a", queued=0),))) == []


def test_demand_for_an_unknown_model_starts_nothing() -> None:
    assert decide(Facts(nodes=(node(),), models=(A,), demands=(demand("z"),))) == []


@pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.READY])
def test_a_model_with_an_instance_gets_no_second_one(state: InstanceState) -> None:
    there = instance("i1", "a", state=state)
    assert decide(Facts(nodes=(node(slots=2),), models=(A,), demands=(demand("a", 99),), instances=(there,))) == []


@pytest.mark.parametrize("away", [{"silent": True}, {"draining": True}])
def test_an_instance_on_a_silent_or_draining_node_is_replaced_elsewhere(away: dict[str, bool]) -> None:
    cluster = Facts(
        nodes=(node("n1", **away), node("n2")), models=(A,), demands=(demand("a"),), instances=(instance("i1", "a"),)
    )
    assert starts(cluster) == [("a", "n2", (0,))]


def test_an_instance_on_a_node_that_has_not_answered_yet_still_counts() -> None:
    cluster = Facts(
        nodes=(node("n1", answered=False), node("n2")),
        models=(A,),
        demands=(demand("a"),),
        instances=(instance("i1", "a"),),
    )
    assert decide(cluster) == []


def test_a_model_whose_only_instance_is_leaving_starts_anew() -> None:
    leaving = instance("i1", "a", stop_asked_ms=0, stops=1)
    cluster = Facts(nodes=(node(slots=2),), models=(A,), demands=(demand("a"),), instances=(leaving,))
    assert starts(cluster) == [("a", "n1", (1,))]


def test_the_oldest_wait_comes_first_and_ties_go_by_model() -> None:
    cluster = Facts(
        nodes=(node(),), models=(A, B, C), demands=(demand("c", 1, 5), demand("b", 9, 5), demand("a", 1, 4))
    )
    assert starts(cluster) == [("b", "n1", (0,))]


def test_instances_share_a_device_only_where_no_device_is_empty() -> None:
    cluster = Facts(
        nodes=(node(slots=2, memory_bytes=4 * GIB),),
        models=(A, B, C),
        demands=(demand("a", 1, 3), demand("b", 1, 2), demand("c", 1, 1)),
    )
    assert starts(cluster) == [("a", "n1", (0,)), ("b", "n1", (1,)), ("c", "n1", (0,))]


def test_among_empty_devices_the_node_that_holds_the_weights_wins() -> None:
    held = (HeldView(node="n2", model_id="a", ssd_bytes=GIB),)
    facts = Facts(nodes=(node("n1"), node("n2")), models=(A,), demands=(demand("a"),), held=held)
    assert starts(facts) == [("a", "n2", (0,))]


def test_an_instance_of_an_unknown_model_holds_its_device_whole() -> None:
    found = instance("i1", "z", gpu_bytes=None, running=1)
    big = node(memory_bytes=64 * GIB)
    assert starts(Facts(nodes=(big,), models=(A,), demands=(demand("a"),), instances=(found,))) == []


def test_a_vllm_model_waits_for_the_zygote_and_a_simulated_one_does_not() -> None:
    sim = model_spec("s", engine=EngineKind.SIM)
    importing = node(slots=2, zygote_ready=False)
    cluster = Facts(nodes=(importing,), models=(A, sim), demands=(demand("a"), demand("s")))
    assert starts(cluster) == [("s", "n1", (0,))]


def test_an_instance_idle_past_its_keep_alive_stops() -> None:
    idle = instance("i1", "a", idle_ms=60_001)
    [command] = decide(Facts(nodes=(node(),), models=(A,), instances=(idle,)))
    assert command == Stop(instance_id="i1", reason="idle for 60001 ms, kept alive for 60 s", only_if_idle=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"idle_ms": 60_000},
        {"idle_ms": 99_000, "running": 1},
        {"idle_ms": 99_000, "state": InstanceState.STARTING},
        {"idle_ms": 99_000, "state": InstanceState.STOPPING},
    ],
)
def test_an_instance_stays_within_its_keep_alive_or_while_it_is_busy_starting_or_stopping(
    fields: dict[str, object],
) -> None:
    assert stops(Facts(nodes=(node(),), models=(A,), instances=(instance("i1", "a", **fields),))) == []


def test_an_idle_instance_stays_while_its_model_is_demanded() -> None:
    idle = instance("i1", "a", idle_ms=99_000)
    assert stops(Facts(nodes=(node(),), models=(A,), instances=(idle,), demands=(demand("a"),))) == []


def test_instances_of_a_deleted_model_stop_once_they_are_idle() -> None:
    busy, idle = instance("i1", "z", running=1), instance("i2", "z", state=InstanceState.STARTING)
    [command] = decide(Facts(nodes=(node(),), instances=(busy, idle)))
    assert command == Stop(instance_id="i2", reason="its model was deleted", only_if_idle=False)


def test_a_stop_that_had_no_effect_is_repeated_ever_more_slowly() -> None:
    def asked(stop_asked_ms: int, stops_so_far: int) -> Facts:
        there = instance("i1", "a", stop_asked_ms=stop_asked_ms, stops=stops_so_far)
        return Facts(nodes=(node(),), models=(A,), instances=(there,))

    assert stops(asked(1_999, 1)) == []
    assert stops(asked(2_000, 1)) == ["i1"]
    assert stops(asked(7_999, 3)) == []
    assert stops(asked(60_000, 99)) == ["i1"]


def test_the_longest_idle_instance_of_another_model_makes_room_and_ties_go_by_id() -> None:
    cluster = Facts(
        nodes=(node(slots=3),),
        models=(A, B, C, model_spec("d")),
        demands=(demand("a"),),
        instances=(
            instance("i3", "b", idle_ms=10, devices=(0,)),
            instance("i2", "c", idle_ms=20, devices=(1,)),
            instance("i1", "d", idle_ms=20, devices=(2,)),
        ),
    )
    [command] = decide(cluster)
    assert command == Stop(instance_id="i1", reason="idle for 20 ms, makes room for a", only_if_idle=True)


def test_as_many_instances_make_room_as_the_model_needs_and_no_more() -> None:
    small = {"gpu_bytes": GIB}
    big = model_spec("big", weight_bytes=2 * GIB)  # 2.75 GiB
    cluster = Facts(
        nodes=(node(memory_bytes=4 * GIB),),
        models=(A, B, C, big),
        demands=(demand("big"),),
        instances=tuple(instance(f"i{n}", m, idle_ms=n, **small) for n, m in enumerate("abc")),
    )
    assert stops(cluster) == ["i2", "i1"]


def test_while_room_is_being_made_nobody_else_is_stopped() -> None:
    cluster = Facts(
        nodes=(node(slots=2),),
        models=(A, B, C),
        demands=(demand("a"),),
        instances=(
            instance("i1", "b", idle_ms=10, stop_asked_ms=100, stops=1),
            instance("i2", "c", idle_ms=50, devices=(1,)),
        ),
    )
    assert decide(cluster) == []


def test_room_that_is_being_made_for_one_model_is_not_promised_to_another() -> None:
    cluster = Facts(
        nodes=(node(slots=2),),
        models=(A, B, C, model_spec("d")),
        demands=(demand("a", 1, 9), demand("d", 1, 8)),
        instances=(
            instance("i1", "b", idle_ms=10, stop_asked_ms=100, stops=1),
            instance("i2", "c", idle_ms=50, devices=(1,)),
        ),
    )
    assert stops(cluster) == ["i2"]
    assert starts(cluster) == []


def test_a_younger_small_demand_does_not_take_what_an_older_big_one_waits_for() -> None:
    big = model_spec("big", weight_bytes=3 * GIB)  # 3.85 GiB
    cluster = Facts(
        nodes=(node(memory_bytes=4 * GIB),),
        models=(A, B, big),
        demands=(demand("big", 1, 500), demand("a", 1, 0)),
        instances=(instance("i1", "b", stop_asked_ms=10, stops=1),),
    )
    assert starts(cluster) == []


def test_neither_busy_nor_demanded_instances_make_room() -> None:
    cluster = Facts(
        nodes=(node(slots=2),),
        models=(A, B, C),
        demands=(demand("a"), demand("c")),
        instances=(instance("i1", "b", running=1), instance("i2", "c", idle_ms=50_000, devices=(1,))),
    )
    assert decide(cluster) == []


def test_a_model_that_fits_no_device_even_when_empty_is_rejected_with_the_arithmetic() -> None:
    huge = model_spec("huge", weight_bytes=64 * GIB)
    [command] = decide(Facts(nodes=(node(), node("n2", silent=True)), models=(huge,), demands=(demand("huge"),)))
    assert isinstance(command, Reject)
    assert str(huge.gpu_bytes) in command.reason
    assert str(2 * GIB) in command.reason


def test_a_rejection_says_the_same_whichever_node_is_known_first() -> None:
    huge = model_spec("huge", weight_bytes=GIB)
    gpu = node("gpu", devices=(Device(index=0, kind=DeviceKind.CUDA, name="", memory_bytes=GIB),))
    cpu = node("cpu", devices=(Device(index=0, kind=DeviceKind.CPU, name="", memory_bytes=GIB),))
    one, other = (
        decide(Facts(nodes=nodes, models=(huge,), demands=(demand("huge"),))) for nodes in ((gpu, cpu), (cpu, gpu))
    )
    assert one == other


def test_a_model_waits_where_the_only_device_large_enough_is_away() -> None:
    away = node("n2", memory_bytes=80 * GIB, silent=True)
    cluster = Facts(nodes=(node(), away), models=(model_spec("m", weight_bytes=64 * GIB),), demands=(demand("m"),))
    assert decide(cluster) == []


def test_a_model_waits_while_no_node_is_known() -> None:
    assert decide(Facts(models=(A,), demands=(demand("a"),))) == []


def test_a_model_whose_starts_failed_waits_twice_as_long_each_time() -> None:
    def failed(in_row: int, since_ms: int) -> Facts:
        failure = FailureView(model_id="a", in_row=in_row, since_ms=since_ms)
        return Facts(nodes=(node(),), models=(A,), demands=(demand("a"),), failures=(failure,))

    assert starts(failed(1, 1_999)) == []
    assert starts(failed(1, 2_000)) != []
    assert starts(failed(4, 15_999)) == []
    assert starts(failed(4, 16_000)) != []
    assert [backoff_ms(n) for n in (0, 1, 5, 6, 10_000)] == [0, 2_000, 32_000, 60_000, 60_000]


def test_a_waiting_model_stops_nobody() -> None:
    failure = FailureView(model_id="a", in_row=3, since_ms=0)
    idle = instance("i1", "b", idle_ms=10)
    cluster = Facts(nodes=(node(),), models=(A, B), demands=(demand("a"),), failures=(failure,), instances=(idle,))
    assert decide(cluster) == []


def test_each_node_prepares_each_vllm_architecture_once() -> None:
    qwen = model_spec("q", architecture="QwenForCausalLM")
    sim = model_spec("s", architecture="Simulated", engine=EngineKind.SIM)
    cluster = Facts(
        nodes=(node("n1", prepared=()), node("n2"), node("n3", prepared=(), zygote_ready=False)),
        models=(B, A, qwen, sim),
    )
    assert decide(cluster) == [
        Prepare(node="n1", model_id="a", architecture="LlamaForCausalLM"),
        Prepare(node="n1", model_id="q", architecture="QwenForCausalLM"),
        Prepare(node="n2", model_id="q", architecture="QwenForCausalLM"),
    ]


def test_an_architecture_that_is_being_prepared_is_not_ordered_again() -> None:
    busy = node("n1", prepared=(), preparing=("LlamaForCausalLM",))
    assert decide(Facts(nodes=(busy,), models=(A,))) == []


def test_a_cpu_slot_holds_one_instance_however_much_memory_it_has() -> None:
    slots = tuple(Device(index=i, kind=DeviceKind.CPU, name="", memory_bytes=64 * GIB) for i in range(2))
    cluster = Facts(
        nodes=(node(devices=slots),),
        models=tuple(model_spec(m) for m in "abc"),
        demands=(demand("a", 1, 30), demand("b", 1, 20), demand("c", 1, 10)),
    )
    starts = [c for c in decide(cluster) if isinstance(c, Start)]
    assert [(c.model_id, c.devices) for c in starts] == [("a", (0,)), ("b", (1,))]
