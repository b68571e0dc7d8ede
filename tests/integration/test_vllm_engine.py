"""The vLLM engine itself, on a made-up model: what the gateway relies on when it validates requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from tests.support.fake_instance import VOCAB_SIZE, model_spec
from tests.support.lent import lent
from tests.support.tiny_model import write_tiny_model

from stoker_contracts.inference import Finish, Sampling
from stoker_contracts.models import DeviceKind, EngineKind
from stoker_core.errors import InvalidRequest
from stoker_worker.engines.base import Engine, EngineRequest

CONTEXT = 64
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("vllm")
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with mock.patch.dict(os.environ, environment):
        import torch

        from stoker_worker.engines.vllm import VllmEngine

        torch.set_num_threads(1)
        path = write_tiny_model(directory / "model", dtype="float32", tokenizer=False)
        spec = model_spec(engine=EngineKind.VLLM, dtype="float32", max_model_len=CONTEXT, kv_cache_bytes=16 << 20)
        with lent(path) as lease:
            engine = VllmEngine(
                spec, lease.path, lease=lease, device=DeviceKind.CPU, device_bytes=1 << 30, batched_tokens_max=64
            )
            assert lease.load_ms == engine.load_ms > 0, "it ends its lease"
            yield engine


def run(engine: Engine, *requests: EngineRequest) -> dict[str, tuple[list[int], Finish | None]]:
    for request in requests:
        engine.add(request)
    got: dict[str, tuple[list[int], Finish | None]] = {r.key: ([], None) for r in requests}
    while engine.has_work():
        for output in engine.step():
            tokens, _ = got.setdefault(output.key, ([], None))
            got[output.key] = ([*tokens, *output.tokens], output.finish)
    return got


def ask(engine: Engine, prompt: list[int] = PROMPT, **sampling: object) -> tuple[list[int], Finish | None]:
    values: dict[str, object] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    return run(engine, EngineRequest("r", prompt, Sampling(**(values | sampling))))["r"]  # type: ignore[arg-type]


def test_a_prompt_and_its_answer_may_fill_the_context_exactly(engine: Engine) -> None:
    tokens, finish = ask(engine, [5] * (CONTEXT - 4), max_tokens=4)
    assert (len(tokens), finish) == (4, Finish.LENGTH)
    tokens, finish = ask(engine, [5] * (CONTEXT - 1), max_tokens=1)
    assert (len(tokens), finish) == (1, Finish.LENGTH)


def test_a_request_that_vllm_refuses_ends_alone(engine: Engine) -> None:
    engine.add(EngineRequest("good", PROMPT, Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)))
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("long", [5] * (CONTEXT + 1), Sampling(max_tokens=4)))
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("hot", PROMPT, Sampling(max_tokens=4, temperature=-1.0)))
    got = run(engine, EngineRequest("next", PROMPT, Sampling(max_tokens=2, ignore_eos=True)))
    assert {key: (len(tokens), finish) for key, (tokens, finish) in got.items()} == {
        "good": (4, Finish.LENGTH),
        "next": (2, Finish.LENGTH),
    }


def test_the_same_seed_gives_the_same_tokens_whatever_its_value(engine: Engine) -> None:
    for seed in (0, 7, -1, -(2**63), 2**63 - 1):
        one, other = (ask(engine, temperature=2.0, seed=seed)[0] for _ in range(2))
        assert one == other, f"seed {seed}"
    unseeded = {tuple(ask(engine, temperature=2.0)[0]) for _ in range(3)}
    assert len(unseeded) > 1


def test_top_k_of_one_is_greedy_and_zero_or_more_than_there_are_is_all(engine: Engine) -> None:
    assert ask(engine, temperature=2.0, top_k=1)[0] == ask(engine)[0]
    for top_k in (0, VOCAB_SIZE, VOCAB_SIZE + 1, 2**31 - 1):
        assert len({tuple(ask(engine, temperature=2.0, top_k=top_k)[0]) for _ in range(3)}) > 1


def test_extreme_temperatures_and_top_p_are_served(engine: Engine) -> None:
    assert ask(engine, temperature=1e-300)[0] == ask(engine)[0]
    assert ask(engine, temperature=2.0, top_p=1e-9)[0] == ask(engine)[0]


def test_an_end_token_ends_the_answer_and_is_its_last_token_unless_ignored(engine: Engine) -> None:
    free, finish = ask(engine)
    assert finish is Finish.LENGTH
    ends = free[3]
    cut, finish = ask(engine, ignore_eos=False, stop_token_ids=(ends,))
    assert (cut, finish) == (free[: free.index(ends) + 1], Finish.STOP)
    last, finish = ask(engine, ignore_eos=False, stop_token_ids=(ends,), max_tokens=free.index(ends) + 1)
    assert (last, finish) == (cut, Finish.STOP), "the end token at the limit is an end"
    assert ask(engine, ignore_eos=True, stop_token_ids=(ends,))[0] == free


def test_an_aborted_request_gives_no_more_and_others_go_on(engine: Engine) -> None:
    for key in ("a", "b"):
        engine.add(EngineRequest(key, PROMPT, Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)))
    engine.step()
    engine.abort("a")
    engine.abort("never heard of")
    keys = set()
    while engine.has_work():
        keys |= {output.key for output in engine.step()}
    assert keys == {"b"}


def test_a_token_outside_the_vocabulary_is_refused_before_it_reaches_the_model(engine: Engine) -> None:
    with pytest.raises(InvalidRequest):
        engine.add(EngineRequest("r", [5, VOCAB_SIZE], Sampling(max_tokens=1)))
    assert not engine.has_work()
