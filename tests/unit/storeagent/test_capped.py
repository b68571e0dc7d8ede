import asyncio

import pytest
from tests.support.origin_fakes import Serve, Source
from tests.support.storeagent_fakes import model, right
from tests.support.virtual_time import LoopClock, in_virtual_time

from stoker_core.errors import SourceUnavailable
from stoker_storeagent.sources import capped
from stoker_storeagent.sources.capped import Capped
from stoker_storeagent.throttle import BURST_S, Throttle

PIECE, SIZE = 4096, 20000
MODEL = model(sizes=(SIZE,))
RATE = 10_000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "PIECE_BYTES", PIECE)


async def read(source: Source, bytes_per_s: int, offset: int = 0) -> tuple[bytes, list[int]]:
    into, told = bytearray(SIZE - offset), list[int]()
    made = Capped(source, Throttle(bytes_per_s, LoopClock()))
    version = MODEL.versions["0.safetensors"]
    await made.read(MODEL.source, "0.safetensors", version, offset, memoryview(into), told.append)
    return bytes(into), told


@in_virtual_time
async def test_bytes_come_whole_and_no_faster_than_the_limit() -> None:
    source = Source(MODEL)
    into, told = await read(source, RATE)
    assert into == right(MODEL, 0)
    assert told == sorted(told)
    assert told[-1] == SIZE
    assert asyncio.get_running_loop().time() == pytest.approx(SIZE / RATE - BURST_S)
    assert source.giver.asked == [(0, offset) for offset in range(0, SIZE, PIECE)]


@in_virtual_time
async def test_it_begins_where_it_is_told_to() -> None:
    source = Source(MODEL)
    into, told = await read(source, RATE, offset=10_000)
    assert into == right(MODEL, 0)[10_000:]
    assert source.giver.asked[0] == (0, 10_000)
    assert told[-1] == SIZE - 10_000


@in_virtual_time
async def test_without_a_limit_it_is_one_request() -> None:
    source = Source(MODEL)
    assert (await read(source, 0))[0] == right(MODEL, 0)
    assert source.giver.asked == [(0, 0)]
    assert asyncio.get_running_loop().time() == 0.0


@in_virtual_time
async def test_where_it_breaks_off_is_told() -> None:
    away = SourceUnavailable("s3", "reset")
    source = Source(MODEL, Serve(), Serve(1000, away))
    told: list[int] = []
    with pytest.raises(SourceUnavailable):
        await Capped(source, Throttle(RATE, LoopClock())).read(
            MODEL.source, "0.safetensors", '"0.safetensors"', 0, memoryview(bytearray(SIZE)), told.append
        )
    assert told[-1] == PIECE + 1000


def test_it_is_of_the_kind_of_what_it_holds_back() -> None:
    assert Capped(Source(MODEL), Throttle(0, LoopClock())).kind == "s3"
