"""kill -9 of the storage agent, and of its instances, in a system that works: memory keeps what it has, leases end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3
from tests.support.leasing import SHARD, write_model
from tests.support.services import eventually
from tests.support.stack import Stack
from tests.support.stack_tiers import StackTiers, held_in, stack_s3, stack_tiers
from tests.support.tiny_tokenizer import write_tokenizer

from stoker_contracts.models import Tier

CHUNKS = 3
LEASE_ENDS_S = 1.0
PROMPT = "abc"

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def tiers(stack: Stack) -> AsyncIterator[StackTiers]:
    async with stack_tiers(stack) as made:
        yield made


@pytest.fixture
async def s3(stack: Stack, tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with stack_s3(stack, tmp_path / "s3") as server:
        yield server


async def deployed(tiers: StackTiers, s3: HeldS3, name: str, *options: str) -> str:
    """A model of the sim engine in S3, with weights of several chunks and bytes of its own. Returns its id."""
    write_tokenizer(write_model(s3.folder(name), CHUNKS, seed=sum(name.encode())), 512)
    return await tiers.deploy(s3.source(name), name, "--engine", "sim", *options)


async def killed_agent(tiers: StackTiers) -> None:
    """Kill it, and wait until another speaks in its place."""
    old = tiers.status.boot_id
    os.kill(tiers.stack.pid("storeagent"), signal.SIGKILL)
    await eventually(lambda: tiers.status.boot_id != old, what="another agent")


async def test_after_kill_9_of_the_agent_instances_answer_on_and_memory_serves_what_it_had(
    tiers: StackTiers, s3: HeldS3, tmp_path: Path
) -> None:
    kept_id = await deployed(tiers, s3, "kept", "--keep-alive", "1")
    short = await tiers.complete("kept", PROMPT, 20, ignore_eos=True)
    await eventually(lambda: tiers.whole(kept_id, Tier.SSD), what="the copy on the disk")
    running = asyncio.create_task(tiers.complete("kept", PROMPT, 400, ignore_eos=True))
    first = await tiers.ready("kept")
    # Another instance is in the middle of its load.
    midway_id = await deployed(tiers, s3, "midway")
    s3.held = {1}
    waiting = asyncio.create_task(tiers.complete("midway", PROMPT, 20, ignore_eos=True))
    await eventually(lambda: bool(s3.waiting), what="an instance in mid-load")
    # From here on the first model is nowhere but in memory.
    (tiers.ssd / "chunks").rename(tmp_path / "chunks")
    s3.missing = {f"kept/{SHARD}"}

    await killed_agent(tiers)

    assert tiers.whole(kept_id, Tier.DRAM), "at once, before anybody asked for it"
    assert tiers.held(kept_id, Tier.SSD) is None
    assert not running.done()
    text = await running
    assert text.startswith(short)
    assert [i["instance_id"] for i in await tiers.instances("kept", "ready")] == [first["instance_id"]]
    await tiers.idle_out("kept")
    assert await tiers.complete("kept", PROMPT, 400, ignore_eos=True) == text
    second = await tiers.ready("kept")
    assert (second["load_source"], second["instance_id"] == first["instance_id"]) == ("dram", False)
    assert tiers.tier(Tier.SSD).hits == 0
    # Who was cut off gets its weights from the next agent.
    await s3.let_go()
    assert await waiting
    await eventually(lambda: tiers.whole(midway_id, Tier.DRAM), what="the other model in memory")
    await tiers.remove("kept", "midway")


async def test_the_lease_of_an_instance_that_is_killed_ends_within_a_second(tiers: StackTiers, s3: HeldS3) -> None:
    model_id = await deployed(tiers, s3, "stuck")
    s3.held = {1}

    def leases() -> int:
        held = tiers.held(model_id, Tier.DRAM)
        return held.leases if held is not None else 0

    waiting = asyncio.create_task(tiers.complete("stuck", PROMPT, 4))
    await eventually(lambda: leases() == 1, what="a lease")
    [starting] = await tiers.instances("stuck", "starting")
    before = len(tiers.statuses)
    os.kill(starting["pid"], signal.SIGKILL)

    def ended() -> bool:
        """Not only now: another instance may have one already."""
        seen = [held_in(s, model_id, Tier.DRAM) for s in tiers.statuses[before:] if s.node == tiers.node]
        return any(held is None or held.leases == 0 for held in seen)

    await eventually(ended, timeout_s=LEASE_ENDS_S, what="the end of the lease")
    await s3.let_go()
    assert await waiting, "the next instance loads and answers"
    await tiers.remove("stuck")
