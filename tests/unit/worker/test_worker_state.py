from __future__ import annotations

import pytest

from stoker_contracts.control import ENDED_LISTED_S, StartInstance, StopInstance
from stoker_contracts.models import Device, DeviceKind, EngineKind, InstanceState, ModelSpec
from stoker_worker.state import Instance, WorkerState

GIB = 1 << 30


def spec(**fields: object) -> ModelSpec:
    base = {
        "model_id": "m-1",
        "name": "tiny",
        "source": "file:///m",
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "weight_bytes": GIB,
        "max_model_len": 128,
        "vocab_size": 512,
        "kv_bytes_per_token": 64,
        "kv_cache_bytes": 0,
        "slots": 4,
        "engine": EngineKind.SIM,
    }
    return ModelSpec(**(base | fields))


def state(**fields: object) -> WorkerState:
    devices = [Device(index=i, kind=DeviceKind.CUDA, name="gpu", memory_bytes=2 * GIB) for i in range(2)]
    return WorkerState(
        **({"node": "n", "boot_id": "b", "devices": devices, "engines": [EngineKind.SIM], "term": 3} | fields)
    )


def start(**fields: object) -> StartInstance:
    base = {"instance_id": "i-1", "boot_id": "b", "term": 3, "model": spec(), "devices": (0,), "budget_ms": 1000}
    return StartInstance(**(base | fields))


def test_a_superseded_leader_is_refused_and_a_newer_one_is_remembered():
    s = state()
    assert s.check_term(2).code == "stale_term"
    assert s.check_term(5) is None
    assert s.term == 5
    assert s.check_term(4).code == "stale_term"


def test_orders_for_another_boot_are_refused():
    assert state().check_boot("old").code == "wrong_boot"
    assert state().check_boot("b") is None


def test_a_start_that_does_not_fit_beside_what_runs_is_refused_with_the_numbers():
    s = state()
    assert s.check_start(start()) is None
    s.instances["i-0"] = Instance("i-0", spec(), (0,), started_at_s=0.0)
    refused = s.check_start(start())
    assert refused.code == "device_busy"
    assert refused.retryable
    assert str(spec().gpu_bytes) in refused.message
    assert s.check_start(start(devices=(1,))) is None


def test_a_gpu_is_shared_while_memory_lasts_and_a_cpu_slot_never():
    small = spec(weight_bytes=GIB // 4)
    gpu, cpu = (
        state(devices=[Device(index=0, kind=DeviceKind(k), name="", memory_bytes=4 * GIB)]) for k in ("cuda", "cpu")
    )
    for s in (gpu, cpu):
        assert s.check_start(start(model=small)) is None
        s.instances["i-0"] = Instance("i-0", small, (0,), started_at_s=0.0)
    assert gpu.check_start(start(model=small)) is None
    assert cpu.check_start(start(model=small)).code == "device_busy"


def test_an_ended_instance_takes_no_memory():
    s = state()
    ended = Instance("i-0", spec(), (0,), started_at_s=0.0)
    ended.become(InstanceState.FAILED)
    s.instances["i-0"] = ended
    assert s.check_start(start()) is None


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (start(devices=(7,)), "unsupported"),
        (start(devices=()), "unsupported"),
        (start(model=spec(engine=EngineKind.VLLM)), "unsupported"),
        (start(model=spec(engine=EngineKind.UNKNOWN)), "unsupported"),
    ],
)
def test_a_start_this_worker_cannot_do_is_refused(command: StartInstance, code: str):
    assert state().check_start(command).code == code


def test_a_draining_worker_starts_nothing():
    s = state()
    s.draining = True
    assert s.check_start(start()).code == "stopping"


def test_an_instance_with_requests_is_not_stopped_when_only_an_idle_one_is_meant():
    s = state()
    busy = Instance("i-1", spec(), (0,), started_at_s=0.0, running=1)
    s.instances["i-1"] = busy
    command = StopInstance(instance_id="i-1", boot_id="b", term=3, only_if_idle=True)
    assert s.check_stop(command).code == "busy"
    busy.running = 0
    assert s.check_stop(command) is None


def test_states_only_move_forward():
    instance = Instance("i-1", spec(), (0,), started_at_s=0.0)
    instance.become(InstanceState.READY)
    with pytest.raises(ValueError, match="cannot go"):
        instance.become(InstanceState.STARTING)


def test_ended_instances_are_listed_for_a_while_and_then_forgotten():
    s = state()
    ended = Instance("i-0", spec(), (0,), started_at_s=0.0)
    ended.become(InstanceState.FAILED)
    ended.ended_at_s = 100.0
    s.instances["i-0"] = ended
    s.forget_ended(100.0 + ENDED_LISTED_S - 1)
    assert "i-0" in s.instances
    s.forget_ended(100.0 + ENDED_LISTED_S + 1)
    assert "i-0" not in s.instances


def test_an_instance_starts_until_it_is_ready_or_about_to_end():
    s = state()
    for number, reached in enumerate([None, InstanceState.READY, InstanceState.STOPPING, InstanceState.FAILED]):
        instance = Instance(f"i-{number}", spec(), (0,), started_at_s=0.0)
        if reached is not None:
            instance.become(reached)
        s.instances[instance.instance_id] = instance
    assert s.starting() == ("i-0",)
