"""Which origin a chunk is asked of, how often, and from which byte on."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.origin_fakes import Giver, Peers, Serve, Source
from tests.support.storeagent_fakes import model, right
from tests.support.virtual_time import LoopClock, in_virtual_time

from stoker_contracts.models import Tier
from stoker_core.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    NotHeld,
    PeerFailed,
    RefusedCheckpoint,
    SourceDenied,
    SourceUnavailable,
    StokerError,
)
from stoker_storeagent.origins import BEGINS_POLL_S, BEGINS_S, PAUSE_MAX_S, PAUSE_S, TRIES, OriginFinder, Origins
from stoker_storeagent.ports import Source as AnySource

MODEL = model()
POSITION, SIZE = 1, 20000
AWAY = SourceUnavailable("s3", "503")
BROKE = PeerFailed("n1", "it closed the connection")
FOR_GOOD = [SourceDenied("s3", "403"), CheckpointChanged("s", "other ETag"), RefusedCheckpoint("s", "gone")]
FOR_GOOD += [CorruptCheckpoint("s", "short")]


def source(*script: Serve, then: Serve | None = None) -> Source:
    return Source(MODEL, *script, then=then)


def peer(*script: Serve, then: Serve | None = None) -> Giver:
    return Giver(MODEL, list(script), then or Serve())


class Rig:
    def __init__(self, made_source: Source, *, jitter: float = 1.0, **peers: Giver) -> None:
        self.source, self.peers = made_source, Peers(**peers)
        self.finder = OriginFinder("n0", lambda url: self.source, self.peers, LoopClock(), lambda: jitter)
        self.place = bytearray(SIZE)
        self.told: list[int] = []

    async def find(self, *wanted: str) -> Origins:
        return await self.finder.find(MODEL, wanted)

    async def read(self, origins: Origins | None = None, done_bytes: int = 0) -> str:
        """Whom it is from. All that is there afterwards is right."""
        self.told.clear()
        self.place[:done_bytes] = right(MODEL, POSITION)[:done_bytes]
        origin, _ = await (origins or await self.find()).read(
            POSITION, done_bytes, memoryview(self.place), lambda size, _: self.told.append(size)
        )
        assert bytes(self.place) == right(MODEL, POSITION)
        assert self.told == sorted(self.told)
        assert self.told[-1] == SIZE
        return origin.name if origin is not None else "several"

    @property
    def asked(self) -> list[tuple[int, int]]:
        return self.source.giver.asked


@in_virtual_time
async def test_peers_come_first_and_the_models_own_source_last() -> None:
    rig = Rig(source(), n1=peer(), n2=peer())
    rig.peers.bandwidth = {"n1": 1.0, "n2": 2.0}
    origins = await rig.find()
    assert origins.first is not None
    assert (origins.first.tier, origins.first.name) == (Tier.PEER, "n2")
    assert origins.upstream == ("n2", "before n2")
    assert await rig.read(origins) == "n2"
    assert rig.asked == []


@in_virtual_time
async def test_who_is_wanted_goes_before_the_faster_one() -> None:
    rig = Rig(source(), n1=peer(), n2=peer())
    rig.peers.bandwidth = {"n2": 2.0}
    assert await rig.read(await rig.find("n1")) == "n1"


@pytest.mark.parametrize(("begins_s", "first"), [(1.0, "n2"), (BEGINS_S * 2, "n1")])
@in_virtual_time
async def test_the_first_of_those_who_are_wanted_gets_a_moment_to_begin(begins_s: float, first: str) -> None:
    rig = Rig(source(), n1=peer(), n2=peer())
    rig.peers.begin_s["n2"] = begins_s
    assert await rig.read(await rig.find("n2", "n1")) == first
    assert asyncio.get_running_loop().time() == pytest.approx(min(begins_s, BEGINS_S), abs=2 * BEGINS_POLL_S)


@in_virtual_time
async def test_without_peers_nothing_is_upstream() -> None:
    origins = await Rig(source()).find()
    assert origins.upstream == ()
    assert origins.first is not None
    assert origins.first.tier is Tier.REMOTE


@in_virtual_time
async def test_a_source_that_this_node_may_not_use_does_not_matter_while_a_peer_has_the_model() -> None:
    def refuse(url: str) -> AnySource:
        raise RefusedCheckpoint(url, "not allowed here")

    for peers in (Peers(n1=peer()), Peers()):
        finder = OriginFinder("n0", refuse, peers, LoopClock(), lambda: 1.0)
        if peers.nodes:
            assert (await finder.find(MODEL)).first is not None
        else:
            with pytest.raises(RefusedCheckpoint):
                await finder.find(MODEL)


@in_virtual_time
async def test_a_source_that_breaks_off_goes_on_where_it_did() -> None:
    rig = Rig(source(Serve(7000, AWAY), Serve(3000, AWAY)))
    assert await rig.read() == "s3"
    assert rig.asked == [(POSITION, 0), (POSITION, 7000), (POSITION, 10000)]


@in_virtual_time
async def test_what_is_there_already_is_not_asked_for_again() -> None:
    rig = Rig(source(Serve(4096, AWAY)))
    await rig.read(done_bytes=8192)
    assert rig.asked == [(POSITION, 8192), (POSITION, 12288)]
    assert rig.told[0] > 8192


@in_virtual_time
async def test_pauses_double_up_to_a_limit() -> None:
    rig = Rig(source(then=Serve(0, AWAY)))
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(SourceUnavailable):
        await rig.read()
    assert len(rig.asked) == TRIES
    expected_s = sum(min(PAUSE_S * 2**number, PAUSE_MAX_S) for number in range(TRIES - 1))
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(expected_s)


@in_virtual_time
async def test_jitter_halves_a_pause_at_most() -> None:
    rig = Rig(source(Serve(0, AWAY)), jitter=0.0)
    began_s = asyncio.get_running_loop().time()
    await rig.read()
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(PAUSE_S / 2)


@in_virtual_time
async def test_a_source_that_is_well_again_before_the_last_try_is_used() -> None:
    rig = Rig(source(*[Serve(0, AWAY)] * (TRIES - 1)))
    assert await rig.read() == "s3"


@in_virtual_time
async def test_bytes_between_failures_begin_the_tries_anew() -> None:
    broken = [Serve(1000, AWAY)] + [Serve(0, AWAY)] * (TRIES - 2)
    rig = Rig(source(*broken * 3))
    assert await rig.read() == "s3"
    assert len(rig.asked) == 3 * len(broken) + 1


@pytest.mark.parametrize("error", FOR_GOOD, ids=lambda error: type(error).__name__)
@in_virtual_time
async def test_a_source_that_fails_for_good_is_asked_once(error: StokerError) -> None:
    rig = Rig(source(then=Serve(3000, error)))
    origins = await rig.find()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            await rig.read(origins)
        assert caught.value is error
    assert rig.asked == [(POSITION, 0)]
    assert origins.first is None


@in_virtual_time
async def test_a_peer_that_fails_is_suspected_and_another_goes_on_where_it_broke_off() -> None:
    rig = Rig(source(), n1=peer(then=Serve(9000, BROKE)), n2=peer())
    rig.peers.bandwidth = {"n1": 9.0, "n2": 1.0}
    origins = await rig.find()
    assert await rig.read(origins) == "several"
    assert rig.peers.nodes["n2"].asked == [(POSITION, 9000)]
    assert rig.peers.suspected == [("n1", BROKE.message)]
    assert await rig.read(origins) == "n2"
    assert len(rig.peers.nodes["n1"].asked) == 1


@in_virtual_time
async def test_a_peer_that_lacks_one_chunk_is_asked_for_the_next() -> None:
    rig = Rig(source(), n1=peer(Serve(0, NotHeld())))
    origins = await rig.find()
    assert await rig.read(origins) == "s3"
    assert await rig.read(origins) == "n1"
    assert rig.peers.suspected == []


@in_virtual_time
async def test_a_chunk_that_nobody_has_is_not_held() -> None:
    rig = Rig(source(then=Serve(0, SourceDenied("s3", "403"))), n1=peer(then=Serve(0, NotHeld())))
    origins = await rig.find()
    with pytest.raises(SourceDenied):
        await rig.read(origins)
    with pytest.raises(NotHeld):
        await rig.read(origins)


@in_virtual_time
async def test_who_gave_wrong_bytes_is_asked_no_more_and_a_peer_is_suspected() -> None:
    rig = Rig(source(), n1=peer())
    origins = await rig.find()
    wrong = CorruptCheckpoint("m", "another digest")
    first = origins.first
    assert first is not None
    for _ in range(2):  # several chunks of it may be found wrong at once
        origins.give_up(first, wrong)
    assert rig.peers.suspected == [("n1", wrong.message)]
    assert await rig.read(origins) == "s3"


@in_virtual_time
async def test_the_last_error_tells_why_no_origin_is_left() -> None:
    rig = Rig(source(then=Serve(0, FOR_GOOD[0])), n1=peer(then=Serve(0, BROKE)))
    with pytest.raises(SourceDenied):
        await rig.read()
    with pytest.raises(SourceUnavailable):
        await rig.read(Origins([], LoopClock(), lambda: 1.0))


@in_virtual_time
async def test_a_sources_bandwidth_is_measured_and_what_was_there_already_does_not_count() -> None:
    rig = Rig(source(Serve(5000, AWAY)))
    await rig.read(done_bytes=4096)
    assert rig.finder.remote.total_bytes == SIZE - 4096


OUTCOMES = {
    "right": Serve(),
    "away": Serve(0, AWAY),
    "breaks off": Serve(4000, AWAY),
    "lacks it": Serve(0, NotHeld()),
    "peer broke": Serve(4000, BROKE),
    "denied": Serve(0, FOR_GOOD[0]),
    "changed": Serve(0, FOR_GOOD[1]),
}
SCRIPT = st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=8)


@settings(max_examples=150, deadline=None)
@given(of_source=SCRIPT, of_peers=st.lists(SCRIPT, max_size=3), done_bytes=st.sampled_from([0, 4096, 16384]))
@in_virtual_time
async def test_whatever_origins_do_the_chunk_comes_whole_or_a_typed_error_says_why_it_does_not(
    of_source: list[str], of_peers: list[list[str]], done_bytes: int
) -> None:
    def script(names: list[str]) -> list[Serve]:
        return [OUTCOMES[name] for name in names]

    peers = {f"n{number}": peer(*script(names)) for number, names in enumerate(of_peers, 1)}
    rig = Rig(source(*script(of_source)), **peers)
    try:
        came = bool(await rig.read(done_bytes=done_bytes))
    except StokerError:
        came = False
    assert came or {"denied", "changed", "lacks it"} & set(of_source) or len(of_source) >= TRIES
    givers = [rig.source.giver, *peers.values()]
    assert all(giver.at_once == 0 for giver in givers)
    assert all(offset >= done_bytes for giver in givers for _, offset in giver.asked)
    assert sum(len(giver.asked) for giver in givers) <= TRIES * 8 + 2 * len(peers)
