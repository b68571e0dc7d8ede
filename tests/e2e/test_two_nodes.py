"""A second node joins the running system: its own storage agent and worker, under another name and home."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.services import eventually, running
from tests.support.stack import DEMO_CACHE, Stack

pytestmark = pytest.mark.timeout(300)

OTHER = "node-b"


@pytest.fixture
def second_node(stack: Stack) -> Iterator[None]:
    home = Path(tempfile.mkdtemp(prefix="stoker-test-"))
    environment = {
        "STOKER_HOME": str(home),
        "STOKER_NODE": OTHER,
        "STOKER_NATS_URL": stack.endpoints["nats_url"],
        "STOKER_POSTGRES_URL": stack.endpoints["postgres_url"],
        "STOKER_WORKER_CPU_SLOTS": "1",
    }
    with (
        running("stoker_storeagent", environment, home / "storeagent.log"),
        running("stoker_worker", environment, home / "worker.log"),
    ):
        yield
    shutil.rmtree(home)


async def test_a_model_starts_on_another_node_when_the_first_is_full(stack: Stack, second_node: None):
    def ready() -> bool:
        _, _, answer = stack.http("GET", "/admin/v1/nodes")
        return any(n["node"] == OTHER and n["zygote_ready"] and n["tiers"] for n in answer["nodes"])

    await eventually(ready, timeout_s=60, what="the second node reports")
    source = next(DEMO_CACHE.glob("demo-*/smollm2-135m"))
    names = ["spread-a", "spread-b", "spread-c"]
    for name in names:
        assert stack.cli("deploy", str(source), "--name", name).returncode == 0
        status, _, answer = stack.http("POST", "/v1/completions", {"model": name, "prompt": "Hi", "max_tokens": 2})
        assert status == 200, answer
    homes = {i["node"] for name in names for i in stack.instances(name) if i["state"] == "ready"}
    assert OTHER in homes
    for name in names:
        assert stack.cli("rm", name).returncode == 0
