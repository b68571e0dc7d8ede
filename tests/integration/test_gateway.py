"""The gateway's OpenAI API on real NATS and Postgres, asked with the openai client; instances answer by script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.fake_instance import model_spec
from tests.support.gateway_rig import Rig, eventually, gateway_rig, tokens_of
from tests.support.tiny_tokenizer import END_ID

from stoker_contracts.inference import Finish
from stoker_contracts.models import InstanceState

HELLO: Any = [{"role": "user", "content": "Hello"}]
PARIS = "The capital is Paris 🎉."


@pytest.fixture
async def rig(nats_url: str, postgres_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    async with gateway_rig(nats_url, postgres_url, tmp_path) as rig:
        yield rig


async def test_models_are_listed_and_found(rig: Rig) -> None:
    assert [model.id async for model in rig.client.models.list()] == ["tiny"]
    assert (await rig.client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        await rig.client.models.retrieve("absent")
    assert caught.value.code == "model_not_found"


async def test_a_chat_is_answered_with_text_usage_and_timing(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, [*tokens_of(PARIS), END_ID])
    raw = await rig.client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, temperature=0, top_p=0.5, seed=7, extra_body={"top_k": 3}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == PARIS
    assert answer.choices[0].finish_reason == "stop"
    prompt = tokens_of("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens_of(PARIS)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert raw.headers["x-request-id"].startswith("req-")
    assert [part.split(";")[0] for part in raw.headers["server-timing"].split(", ")] == ["prepare", "wait"]

    sampling = instance.generates[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0, 0.5, 3, 7)
    assert sampling.stop_token_ids == (END_ID,)
    assert sampling.max_tokens == rig.spec.max_model_len - len(prompt)
    assert list(memoryview(instance.generates[0].prompt).cast("I")) == prompt


async def test_a_stream_comes_in_pieces_that_add_up(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, [*tokens_of(PARIS), END_ID])
    instance.delay_s = 0.005
    stream = await rig.client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    texts = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(t or "" for t in texts) == PARIS
    assert len([t for t in texts if t]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokens_of(PARIS)) + 1
    assert len({c.id for c in chunks}) == 1


async def test_completions_take_text_and_token_ids(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of(" world"))
    answer = await rig.client.completions.create(model="tiny", prompt="Hello", max_tokens=100)
    assert answer.choices[0].text == " world"
    assert (await rig.client.completions.create(model="tiny", prompt=tokens_of("Hello"))).choices[0].text == " world"
    assert instance.generates[0].prompt == instance.generates[1].prompt
    stream = await rig.client.completions.create(model="tiny", prompt=["Hello"], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == " world"


async def test_a_stop_string_cuts_the_text_and_cancels_at_the_instance(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("one two three four " * 8))
    instance.delay_s = 0.01
    answer = await rig.client.chat.completions.create(model="tiny", messages=HELLO, stop=["hree f", "absent"])
    assert answer.choices[0].message.content == "one two t"
    assert answer.choices[0].finish_reason == "stop"
    await eventually(lambda: instance.unacked == 0, "the instance is told to stop")


async def test_max_tokens_ends_an_answer_by_length(rig: Rig) -> None:
    await rig.node.add("i1", rig.spec, tokens_of(PARIS))
    answer = await rig.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_ignore_eos_sends_no_end_tokens(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("hi"))
    await rig.client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True})
    assert instance.generates[0].sampling.ignore_eos
    assert instance.generates[0].sampling.stop_token_ids == ()


async def test_finishes_are_acked_and_lost_frames_are_asked_for_again(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of(PARIS))
    instance.drop_every = 2
    answer = await rig.client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == PARIS
    await eventually(lambda: instance.unacked == 0, "the finish is acked")
    assert not instance.cancels


async def test_an_unknown_model_is_404(rig: Rig) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await rig.client.chat.completions.create(model="absent", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"[" * 200_000, None),
        (b'{"model": "tiny", "messages": "\xff"}', None),
        ({"messages": HELLO}, "model"),
        ({"model": "tiny"}, "messages"),
        ({"model": "tiny", "messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"model": "tiny", "messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"model": "tiny", "messages": HELLO, "n": 2}, "n"),
        ({"model": "tiny", "messages": HELLO, "logprobs": True}, "logprobs"),
        ({"model": "tiny", "messages": HELLO, "made_up": 1}, "made_up"),
        ({"model": "tiny", "messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"model": "tiny", "messages": [{"role": "developer", "content": "x"}]}, "messages"),
        ({"model": "tiny", "messages": HELLO, "max_tokens": 250}, "max_tokens"),
        ({"model": "tiny", "messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    ],
)
async def test_bad_bodies_are_400_with_the_field_named(rig: Rig, body: object, param: str | None) -> None:
    status, answer, response = await rig.post("/v1/chat/completions", body)
    assert status == 400
    error = answer["error"]
    assert isinstance(error, dict)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert response.headers["x-request-id"]


async def test_too_long_a_prompt_names_its_length(rig: Rig) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await rig.client.completions.create(model="tiny", prompt=[5] * 256)
    assert caught.value.code == "context_length_exceeded"
    assert "256" in caught.value.message


async def test_an_oversize_body_is_413_and_an_unknown_route_404(rig: Rig) -> None:
    status, answer, _ = await rig.post("/v1/chat/completions", b" " * (1024 * 1024 + 1))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")  # type: ignore[index]
    status, answer, _ = await rig.post("/v1/nothing", {})
    assert (status, answer["error"]["code"]) == (404, "not_found")  # type: ignore[index]
    status, answer, _ = await rig.post("/v1/models", {})
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")  # type: ignore[index]


async def test_a_client_that_leaves_frees_its_slot_at_once(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 40))
    instance.delay_s = 0.05
    stream = await rig.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: bool(instance.cancels) and instance.running == 0, "the request is cancelled")

    waiting = asyncio.create_task(rig.client.chat.completions.create(model="tiny", messages=HELLO))
    await eventually(lambda: len(instance.generates) == 2, "the second request arrives")
    waiting.cancel()
    await eventually(lambda: len(instance.cancels) == 2 and instance.running == 0, "so is one without a stream")


async def test_a_dead_instance_fails_its_requests_and_the_next_one_works(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 40))
    instance.delay_s = 0.05
    plain = asyncio.create_task(rig.client.chat.completions.create(model="tiny", messages=HELLO))
    stream = await rig.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    pieces = []

    async def read() -> None:
        async for chunk in stream:
            pieces.append(chunk)
            if len(pieces) == 2:
                await instance.die("out of memory")

    with pytest.raises(openai.APIError) as broken:
        await read()
    assert pieces
    assert broken.value.code == "instance_lost"
    assert "out of memory" in str(broken.value)
    with pytest.raises(openai.APIStatusError) as caught:
        await plain
    assert caught.value.status_code == 502
    assert caught.value.code == "instance_lost"

    await rig.node.add("i2", rig.spec, tokens_of("back"))
    answer = await rig.client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.choices[0].message.content == "back"


async def test_an_instance_that_falls_silent_is_lost(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 40))
    instance.delay_s = 0.05
    asked = asyncio.create_task(rig.client.chat.completions.create(model="tiny", messages=HELLO))
    await eventually(lambda: instance.running == 1, "the request runs")
    instance.mute()
    with pytest.raises(openai.APIStatusError) as caught:
        await asked
    assert caught.value.code == "instance_lost"
    assert "silent" in str(caught.value)


async def test_an_engine_error_is_500_with_its_reason(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("so far"))
    instance.finish, instance.error = Finish.ERROR, "out of blocks"
    with pytest.raises(openai.InternalServerError) as caught:
        await rig.client.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.code == "engine_failed"
    assert "out of blocks" in str(caught.value)


async def test_a_stream_that_began_ends_with_an_error_event_and_no_end_mark(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("so far"))
    instance.finish, instance.error = Finish.ERROR, "out of blocks"
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    async with rig.http.post("/v1/chat/completions", json=body) as response:
        events = [line[6:] async for line in response.content if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "engine_failed"
    assert b"[DONE]" not in b"".join(events)


async def test_a_short_stream_has_its_end_mark(rig: Rig) -> None:
    await rig.node.add("i1", rig.spec, [END_ID])
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    async with rig.http.post("/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.content if line.strip()]
        assert response.headers["Content-Type"].startswith("text/event-stream")
    assert lines[-1] == b"data: [DONE]\n"
    assert json.loads(lines[0][6:])["choices"][0]["delta"]["role"] == "assistant"


async def test_requests_for_a_starting_model_go_through_when_it_is_ready(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("warm"), state=InstanceState.STARTING)
    asked = [asyncio.create_task(rig.client.chat.completions.create(model="tiny", messages=HELLO)) for _ in range(6)]
    await asyncio.sleep(0.3)
    assert not instance.generates
    await instance.become(InstanceState.READY)
    answers = await asyncio.gather(*asked)
    assert {answer.choices[0].message.content for answer in answers} == {"warm"}
    metrics = await (await rig.http.get("/metrics")).text()
    assert 'stoker_gateway_cold_starts_total{model="tiny"} 6.0' in metrics


async def test_probes_answer(rig: Rig) -> None:
    await rig.node.add("i1", rig.spec, tokens_of("x"))
    await rig.client.chat.completions.create(model="tiny", messages=HELLO)
    assert (await rig.http.get("/healthz")).status == 200
    assert (await rig.http.get("/readyz")).status == 200
    metrics = await (await rig.http.get("/metrics")).text()
    assert 'stoker_gateway_requests_total{model="tiny",route="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'stoker_gateway_ttft_seconds_count{model="tiny"} 1.0' in metrics
    assert "stoker_gateway_open_streams 0.0" in metrics
    families = {family.name: family for family in text_string_to_metric_families(metrics)}  # Prometheus's own parser
    assert families["stoker_gateway_ttft_seconds"].type == "histogram"
    assert families["stoker_gateway_requests"].type == "counter"
    assert all(family.documentation for family in families.values())


async def test_another_model_without_a_tokenizer_fails_clearly(rig: Rig) -> None:
    await rig.database.models.add(model_spec("bare"), [])
    await asyncio.sleep(0.5)
    with pytest.raises(openai.InternalServerError) as caught:
        await rig.client.chat.completions.create(model="bare", messages=HELLO)
    assert caught.value.code == "tokenizer_failed"
