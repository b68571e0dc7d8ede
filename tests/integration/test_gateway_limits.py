"""Overload, scarcity, slow clients, lost links and shutdown: every one has an answer."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from tests.support.fake_instance import model_spec
from tests.support.gateway_rig import Rig, eventually, gateway_rig, tokens_of
from tests.support.nats_server import NatsServer, free_port

from stoker_bus.port import Message
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import Demand
from stoker_contracts.inference import RefusedReason

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def rig(nats_url: str, postgres_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    """A small model: one slot, a queue of two, one second of waiting."""
    spec = model_spec(slots=1, queue_max=2, wait_s=1.0)
    async with gateway_rig(nats_url, postgres_url, tmp_path, spec=spec, streams_max=8, drain_s=2.0) as rig:
        yield rig


async def ask(rig: Rig, **fields: Any) -> Any:
    return await rig.client.chat.completions.create(model="tiny", messages=HELLO, **fields)


async def demands(rig: Rig) -> list[Demand]:
    heard: list[Demand] = []

    async def hear(message: Message) -> None:
        heard.append(decode(Demand, message.data))

    await rig.bus.subscribe(subjects.SCHEDULER_DEMAND, hear)
    return heard


async def test_without_capacity_within_the_wait_the_answer_is_503_with_the_last_failure(rig: Rig) -> None:
    heard = await demands(rig)
    crashed = await rig.node.add("i0", rig.spec)
    await crashed.die("the engine ran out of memory")
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(rig)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_capacity"
    assert "ran out of memory" in str(caught.value)
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    await eventually(lambda: bool(heard) and heard[-1].queued == 0, "demand ends")
    assert [one.queued for one in heard] == [1] * (len(heard) - 1) + [0]
    assert len(heard) >= 3
    assert [one.oldest_wait_ms for one in heard[:-1]] == sorted(one.oldest_wait_ms for one in heard[:-1])


async def test_a_full_queue_is_429_with_retry_after(rig: Rig) -> None:
    waiting = [asyncio.create_task(ask(rig)) for _ in range(2)]
    await asyncio.sleep(0.2)
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(rig)
    assert caught.value.code == "overloaded"
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_too_many_requests_in_hand_are_429(rig: Rig) -> None:
    await rig.register(model_spec("other", queue_max=64, wait_s=1.0))
    asked = [rig.client.completions.create(model="other", prompt="x") for _ in range(12)]
    codes = [getattr(e, "code", None) for e in await asyncio.gather(*asked, return_exceptions=True)]
    assert codes.count("overloaded") == 4
    assert codes.count("no_capacity") == 8


async def test_a_burst_on_one_slot_is_served_one_by_one_without_refusals(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("ok"))
    answers = await asyncio.gather(*(ask(rig) for _ in range(3)))
    assert [a.choices[0].message.content for a in answers] == ["ok"] * 3
    assert len(instance.generates) == 3


@pytest.mark.parametrize("reason", [RefusedReason.BUSY, RefusedReason.STOPPING])
async def test_a_refused_request_goes_to_the_next_instance(rig: Rig, reason: RefusedReason) -> None:
    refusing = await rig.node.add("a-first", rig.spec, tokens_of("no"))
    refusing.refuse = reason
    await rig.node.add("b-second", rig.spec, tokens_of("yes"))
    assert (await ask(rig)).choices[0].message.content == "yes"


async def test_an_instance_that_nobody_answers_for_is_passed_over(rig: Rig) -> None:
    gone = await rig.node.add("a-first", rig.spec, tokens_of("no"))
    await rig.node.add("b-second", rig.spec, tokens_of("yes"))
    await gone.disappear()
    assert (await ask(rig)).choices[0].message.content == "yes"


async def test_a_new_boot_of_the_node_ends_the_streams_of_the_old_one(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 40))
    instance.delay_s = 0.05
    asked = asyncio.create_task(ask(rig))
    await eventually(lambda: instance.running == 1, "the request runs")
    rig.node.instances.clear()
    rig.node.boot_id = "boot-2"
    await rig.node.report()
    with pytest.raises(openai.APIStatusError) as caught:
        await asked
    assert caught.value.code == "instance_lost"


async def test_a_deleted_models_waiting_requests_end_with_404(rig: Rig) -> None:
    asked = asyncio.create_task(ask(rig))
    await asyncio.sleep(0.1)
    assert (await rig.http.delete("/admin/v1/models/tiny")).status == 200
    with pytest.raises(openai.NotFoundError):
        await asked


async def test_a_client_that_reads_nothing_is_cut_off_and_its_slot_freed(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    spec = model_spec(max_model_len=400_000)
    settings = {"stream_buffer_tokens_max": 300, "client_stall_s": 2.0}
    async with gateway_rig(nats_url, postgres_url, tmp_path, spec=spec, **settings) as rig:
        instance = await rig.node.add("i1", spec, tokens_of("abcdefgh " * 40_000))
        body = {"model": "tiny", "messages": HELLO, "stream": True}
        async with rig.http.post("/v1/chat/completions", json=body) as response:
            assert response.status == 200
            await eventually(lambda: bool(instance.cancels), "the request is cancelled", timeout_s=60)
            assert instance.running == 0


async def test_stopping_refuses_new_requests_and_finishes_open_streams(rig: Rig) -> None:
    instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 10))
    instance.delay_s = 0.02
    stream = await ask(rig, stream=True)
    rig.stop.set()
    await asyncio.sleep(0.05)
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(rig)
    assert (caught.value.status_code, caught.value.code) == (503, "stopping")
    assert (await rig.http.get("/readyz")).status == 503
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "word " * 10


async def test_a_stream_goes_on_after_the_bus_was_away_for_a_moment(
    nats_server: NatsServer, postgres_url: str, tmp_path: Path
) -> None:
    async with gateway_rig(nats_server.url, postgres_url, tmp_path) as rig:
        instance = await rig.node.add("i1", rig.spec, tokens_of("word " * 12))
        instance.delay_s = 0.1
        asked = asyncio.create_task(ask(rig))
        await eventually(lambda: instance.running == 1, "the request runs")
        nats_server.kill()
        await eventually(lambda: not rig.bus.connected, "the link is down")
        nats_server.start()
        answer = await asked
        assert answer.choices[0].message.content == "word " * 12


async def test_the_process_becomes_ready_serves_and_ends_cleanly_on_sigterm(
    nats_url: str, postgres_url: str, tmp_path: Path
) -> None:
    port = free_port()
    env = {
        "STOKER_HOME": str(tmp_path),
        "STOKER_NATS_URL": nats_url,
        "STOKER_POSTGRES_URL": postgres_url,
        "STOKER_GATEWAY_PORT": str(port),
        "STOKER_NODE": "test",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-m", "stoker_gateway"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
                async with asyncio.timeout(60):
                    while await _status(http, "/readyz") != 200:
                        assert process.poll() is None
                        await asyncio.sleep(0.1)
                taken = await asyncio.to_thread(subprocess.run, command, env=env, capture_output=True, timeout=60)
                assert taken.returncode == 1
                assert b"STOKER_GATEWAY_PORT" in taken.stderr
                process.send_signal(signal.SIGTERM)
                _, log = await asyncio.to_thread(process.communicate, timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert b"service_stopped" in log


async def _status(http: aiohttp.ClientSession, path: str) -> int:
    try:
        async with http.get(path) as response:
            return response.status
    except aiohttp.ClientConnectionError:
        return 0
