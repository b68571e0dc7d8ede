"""A real model starts from S3, then from the SSD, then from memory; and says the same each time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3
from tests.support.services import eventually
from tests.support.stack import DEMO_CACHE, DEMO_MODEL, Stack
from tests.support.stack_tiers import StackTiers, stack_s3, stack_tiers

from stoker_contracts.models import Tier

NAME = "from-s3"
PROMPT = "The capital of France is"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def tiers(stack: Stack) -> AsyncIterator[StackTiers]:
    async with stack_tiers(stack) as made:
        yield made


@pytest.fixture
async def s3(stack: Stack, tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with stack_s3(stack, tmp_path / "s3") as server:
        source = next(DEMO_CACHE.glob(f"demo-*/{DEMO_MODEL}"))
        server.folder(NAME).mkdir()
        for file in source.iterdir():
            server.folder(NAME).joinpath(file.name).symlink_to(file)
        yield server


async def started(tiers: StackTiers, s3: HeldS3) -> tuple[str, str, str]:
    """One cold start: (tier, origin, answer), as the instance, `stoker ps` and the events agree on it."""
    text = await tiers.complete(NAME, PROMPT, 12)
    instance = await tiers.ready(NAME)
    source, origin = instance["load_source"], instance["load_origin"]
    assert instance["phases"]["load_ms"] > 0
    listed = await asyncio.to_thread(tiers.stack.cli, "ps")
    [line] = [line for line in listed.stdout.splitlines() if line.startswith(instance["instance_id"])]
    assert (f" {source} ({origin}) " if origin else f" {source} ") in line
    assert " load " in line
    told = await asyncio.to_thread(tiers.stack.cli, "events", "--no-follow", "--since", "all", "--json")
    [ready] = [
        event["data"]
        for event in map(json.loads, told.stdout.splitlines())
        if event["type"] == "stoker.instance.ready" and event["subject"] == instance["instance_id"]
    ]
    assert (ready["load_source"], ready["load_origin"]) == (source, origin)
    assert ready["start_ms"] > 0
    await tiers.idle_out(NAME)
    return source, origin, text


async def test_a_model_starts_from_s3_then_from_the_disk_then_from_memory_with_equal_answers(
    tiers: StackTiers, s3: HeldS3
) -> None:
    model_id = await tiers.deploy(s3.source(NAME), NAME, "--keep-alive", "1")
    registered_bytes = s3.sent_bytes
    weight_bytes = sum(path.stat().st_size for path in s3.folder(NAME).glob("*.safetensors"))
    assert registered_bytes < weight_bytes / 10, "headers and small files"
    *first, text = await started(tiers, s3)
    assert first == ["remote", "s3"]
    assert "Paris" in text

    await eventually(lambda: tiers.whole(model_id, Tier.SSD), what="the copy on the disk")
    assert s3.sent_bytes - registered_bytes == weight_bytes
    requests = s3.requests
    await tiers.evict(model_id, Tier.DRAM)
    assert await started(tiers, s3) == ("ssd", "", text)
    assert await started(tiers, s3) == ("dram", "", text)
    assert s3.requests == requests, "what lies here is not asked for again"
    await tiers.remove(NAME)
