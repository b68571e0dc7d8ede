"""A second node joins the running system: its own storage agent and worker, under another name and home."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.services import eventually, running
from tests.support.stack import DEMO_CACHE, DEMO_MODEL, Stack
from tests.support.stack_tiers import StackTiers, stack_tiers
from tests.support.tiny_model import write_tiny_model

from stoker_cli.home import load_secrets
from stoker_cli.system import peer_token
from stoker_contracts.models import Tier

pytestmark = pytest.mark.timeout(300)

OTHER = "node-b"
GONE_S = 30.0


@pytest.fixture(scope="module")
def second_node(stack: Stack) -> Iterator[None]:
    home = Path(tempfile.mkdtemp(prefix="stoker-test-"))
    environment = {
        "STOKER_HOME": str(home),
        "STOKER_NODE": OTHER,
        "STOKER_NATS_URL": stack.endpoints["nats_url"],
        "STOKER_POSTGRES_URL": stack.endpoints["postgres_url"],
        "STOKER_WORKER_CPU_SLOTS": "1",
        "STOKER_STOREAGENT_CLUSTER_TOKEN": peer_token(load_secrets(stack.home).cluster_secret),
        "STOKER_STOREAGENT_POOL_BYTES": str(1 << 29),
    }
    with (
        running("stoker_storeagent", environment, home / "storeagent.log"),
        running("stoker_worker", environment, home / "worker.log"),
    ):
        yield
    deadline_s = time.monotonic() + GONE_S
    while listed(stack):  # the gateway may still choose it for what the next test registers
        assert time.monotonic() < deadline_s, f"{OTHER} is still listed"
        time.sleep(0.1)
    shutil.rmtree(home)


def listed(stack: Stack) -> bool:
    """Whether the second node's storage agent is alive for the gateway."""
    _, _, answer = stack.http("GET", "/admin/v1/nodes")
    return any(node["node"] == OTHER and node["store_live"] for node in answer["nodes"])


@pytest.fixture
async def tiers(stack: Stack) -> AsyncIterator[StackTiers]:
    async with stack_tiers(stack) as made:
        yield made


async def test_a_model_starts_on_another_node_when_the_first_is_full(stack: Stack, second_node: None):
    def ready() -> bool:
        _, _, answer = stack.http("GET", "/admin/v1/nodes")
        return any(n["node"] == OTHER and n["zygote_ready"] and n["tiers"] for n in answer["nodes"])

    await eventually(ready, timeout_s=60, what="the second node reports")
    source = next(DEMO_CACHE.glob(f"demo-*/{DEMO_MODEL}"))
    names = ["spread-a", "spread-b", "spread-c"]
    for name in names:
        assert stack.cli("deploy", str(source), "--name", name).returncode == 0
        status, _, answer = stack.http("POST", "/v1/completions", {"model": name, "prompt": "Hi", "max_tokens": 2})
        assert status == 200, answer
    homes = {i["node"] for name in names for i in stack.instances(name) if i["state"] == "ready"}
    assert OTHER in homes
    for name in names:
        assert stack.cli("rm", name).returncode == 0


async def test_what_the_first_node_holds_the_second_starts_from_there(
    stack: Stack, second_node: None, tiers: StackTiers, tmp_path: Path
):
    model_id = await tiers.deploy(next(DEMO_CACHE.glob(f"demo-*/{DEMO_MODEL}")), "given")
    assert stack.cli("prefetch", "given", tiers.node).returncode == 0
    await eventually(lambda: tiers.whole(model_id, Tier.DRAM) and tiers.whole(model_id, Tier.SSD), what="it is there")
    # All three slots are taken, then that of the second node is free.
    fillers = ["filler-a", "filler-b", "filler-c"]
    nodes = {}
    for number, name in enumerate(fillers):
        await tiers.deploy(write_tiny_model(tmp_path / name, seed=number), name, "--engine", "sim")
        await tiers.complete(name, "Hi", 1)
        nodes[name] = (await tiers.ready(name))["node"]
    assert sorted(nodes.values()) == sorted([OTHER, tiers.node, tiers.node])
    [guest] = [name for name, node in nodes.items() if node == OTHER]
    await tiers.remove(guest)
    await tiers.idle_out(guest)

    assert "Paris" in await tiers.complete("given", "The capital of France is", 5)

    instance = await tiers.ready("given")
    assert (instance["node"], instance["load_source"], instance["load_origin"]) == (OTHER, "peer", tiers.node)
    await tiers.remove("given", *(name for name in fillers if name != guest))
