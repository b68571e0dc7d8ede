"""kill -9 of each process of a running system: the supervisor restarts it, and requests succeed again."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from tests.support.services import eventually
from tests.support.stack import CAPITAL, DEMO_MODEL, PROCESSES, Stack

MODEL = DEMO_MODEL
RECOVERY_S = 30.0

pytestmark = pytest.mark.timeout(300)


def ask(stack: Stack, timeout_s: float = 60.0) -> bool:
    """Whether one request is answered, and rightly."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": CAPITAL}],
        "temperature": 0,
        "max_tokens": 8,
    }
    try:
        status, _, answer = stack.http("POST", "/v1/chat/completions", body, timeout_s=timeout_s)
    except OSError:
        return False
    return status == 200 and "Paris" in answer["choices"][0]["message"]["content"]


def restarted(stack: Stack, name: str, old: int) -> bool:
    try:
        return stack.pid(name) != old
    except LookupError:
        return False


@pytest.mark.parametrize("name", list(PROCESSES))
async def test_after_kill_9_it_is_restarted_and_a_request_succeeds(stack: Stack, name: str):
    assert ask(stack)
    old = stack.pid(name)
    os.kill(old, signal.SIGKILL)
    killed_s = time.monotonic()
    await eventually(lambda: restarted(stack, name, old), timeout_s=RECOVERY_S, what=f"{name} restarted")
    while not ask(stack, timeout_s=RECOVERY_S):
        assert time.monotonic() - killed_s < RECOVERY_S, f"no answer after kill -9 of {name}"
        time.sleep(0.1)
    assert time.monotonic() - killed_s < RECOVERY_S


async def test_an_instance_killed_in_mid_request_fails_that_request_and_the_next_one_works(stack: Stack):
    assert ask(stack)
    (instance,) = [i for i in stack.instances(MODEL) if i["state"] == "ready"]
    pid = next(
        p.pid
        for p in psutil.Process(stack.pid("worker")).children(recursive=True)
        if p.name().startswith("inst:") and MODEL[:8] in p.name()
    )
    import threading

    results: list[tuple[int, dict]] = []

    def long_request() -> None:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}
        status, _, answer = stack.http("POST", "/v1/completions", body)
        results.append((status, answer))

    thread = threading.Thread(target=long_request)
    thread.start()
    await eventually(
        lambda: any(i["running"] for i in stack.instances(MODEL) if i["instance_id"] == instance["instance_id"]),
        what="the request runs",
    )
    os.kill(pid, signal.SIGKILL)
    thread.join(20)
    assert results, "the client got its error at once"
    status, answer = results[0]
    assert status >= 500
    assert answer["error"]["code"] == "instance_lost"
    assert ask(stack)
