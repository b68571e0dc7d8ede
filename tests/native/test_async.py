"""The coroutines: they wait without holding up the event loop, and cancelling them leaves nothing behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.native.conftest import POOL_CHUNKS
from tests.support.checkpoints import assert_same

from stoker_checkpoint.load import attach, load
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.reading import Reading
from stoker_checkpoint.reference import read_reference
from stoker_core.errors import LoadCancelled


@asynccontextmanager
async def stuck(pool: Pool, model: Path) -> AsyncIterator[Reading]:
    """A reading through a window that nobody takes anything from: it never ends by itself."""
    manifest = open_checkpoint(model)
    async with pool.read(plan_reads(manifest), manifest, model, window_chunks=1) as reading:
        yield reading


async def longest_pause_s(until: asyncio.Event) -> float:
    """The longest time that the loop kept a task waiting."""
    loop, longest = asyncio.get_running_loop(), 0.0
    while not until.is_set():
        before = loop.time()
        await asyncio.sleep(0.001)
        longest = max(longest, loop.time() - before)
    return longest


async def test_tensors_come_without_holding_up_the_loop(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    over = asyncio.Event()
    pause = asyncio.create_task(longest_pause_s(over))
    for window_bytes in (0, CHUNK_BYTES):
        async with load(manifest, pool, model, window_bytes=window_bytes) as loaded:
            tensors = {name: tensor async for name, tensor in loaded.atensors()}
            await loaded.ready()
        assert_same(tensors, read_reference(manifest, model))
    over.set()
    assert await pause < 1.0


async def test_waiting_for_a_load_that_is_stuck_lets_the_loop_run_and_can_be_cancelled(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    async with stuck(pool, model) as reading:
        plan = plan_reads(manifest)
        over = asyncio.Event()
        pause = asyncio.create_task(longest_pause_s(over))
        with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model) as loaded:
            for waiting in (reading.wait(), loaded.ready(), reading.wait()):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(waiting, 0.15)
            over.set()
            assert await pause < 0.1
            assert len([name async for name, _ in loaded.atensors()]) == 8
        await reading.wait()


async def test_everyone_who_waits_for_a_reading_is_told(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    async with pool.read(plan_reads(manifest), manifest, model) as reading:
        async with asyncio.timeout(30):
            await asyncio.gather(*(reading.wait() for _ in range(5)))
        assert reading.done
        await reading.wait()
        assert reading.progress() == (manifest.file_bytes, manifest.file_bytes)


async def test_a_cancelled_reading_tells_all_who_wait(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    async with stuck(pool, model) as reading:
        plan = plan_reads(manifest)
        with attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=model) as loaded:
            waiting = [asyncio.create_task(reading.wait()), asyncio.create_task(loaded.ready())]
            await asyncio.sleep(0)
            reading.cancel()
            async with asyncio.timeout(10):
                ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(error) for error in ended] == [LoadCancelled, LoadCancelled]


async def test_closing_goes_on_when_who_asked_for_it_is_cancelled(pool: Pool, model: Path) -> None:
    manifest = open_checkpoint(model)
    for _ in range(20):
        reading = pool.read(plan_reads(manifest), manifest, model)
        closing = asyncio.create_task(reading.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await reading.aclose()
        assert pool.native.chunks_free == POOL_CHUNKS
