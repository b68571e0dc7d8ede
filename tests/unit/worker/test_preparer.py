from __future__ import annotations

import asyncio

from tests.unit.worker.test_worker_state import spec, state

from stoker_contracts.models import EngineKind
from stoker_core.errors import EngineFailed
from stoker_worker.prepare import Preparer

MODEL = spec(engine=EngineKind.VLLM, architecture="LlamaForCausalLM")


class FakeZygote:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ready = True

    def prepare(self, architecture: str) -> None:
        if not self.ready:
            raise EngineFailed("not ready")
        self.asked.append(architecture)


def preparer(timeout_s: float = 10.0) -> tuple[Preparer, FakeZygote, set[str]]:
    zygote, worker = FakeZygote(), state(engines=[EngineKind.VLLM])
    made = Preparer(worker, {EngineKind.VLLM: zygote}, timeout_s=timeout_s, changed=lambda: None)  # type: ignore[dict-item]
    return made, zygote, worker.prepared


def test_an_architecture_is_prepared_once_however_often_it_is_wanted():
    p, zygote, prepared = preparer()
    p.want(MODEL)
    p.want(MODEL)
    p.done("LlamaForCausalLM", "")
    p.want(MODEL)
    assert zygote.asked == ["LlamaForCausalLM"]
    assert prepared == {"LlamaForCausalLM"}


def test_the_sim_engine_needs_no_preparation():
    p, zygote, _ = preparer()
    p.want(spec(engine=EngineKind.SIM))
    assert zygote.asked == []


async def test_a_start_waits_for_a_preparation_that_is_under_way_and_goes_on_when_it_fails():
    p, _, prepared = preparer()
    start = asyncio.create_task(p.settled(MODEL))
    await asyncio.sleep(0)
    assert not start.done()
    p.done("LlamaForCausalLM", "vLLM does not know it")
    await start
    assert prepared == set()


async def test_a_start_does_not_wait_for_a_zygote_that_is_not_there():
    p, zygote, _ = preparer()
    zygote.ready = False
    await p.settled(MODEL)


async def test_a_dead_zygote_lets_waiting_starts_go_and_its_successor_is_asked_again():
    p, zygote, prepared = preparer()
    p.want(spec(engine=EngineKind.VLLM, architecture="Qwen2ForCausalLM"))
    p.done("Qwen2ForCausalLM", "")
    start = asyncio.create_task(p.settled(MODEL))
    await asyncio.sleep(0)
    p.zygote_lost()
    await start
    assert prepared == set()
    p.want(MODEL)
    assert zygote.asked.count("LlamaForCausalLM") == 2


async def test_a_start_waits_no_longer_than_a_preparation_may_take():
    p, _, _ = preparer(timeout_s=0.01)
    await p.settled(MODEL)
