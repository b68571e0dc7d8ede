"""Orders that come over the bus: bring a model ahead, give it up, remove it, say what is here."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.held_s3 import HeldS3, held_s3
from tests.support.leasing import (
    chunk_files,
    copied,
    dram,
    lease_once,
    lease_right,
    leased,
    read,
    weight_bytes,
    whole,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import Agent, agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.control import Done, Failed, Located
from stoker_contracts.models import Tier


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


def told(store: Agent) -> list[tuple[str, str]]:
    """What was said of prefetches, and of which model."""
    begin = "stoker.tier.prefetch."
    return [(e["type"].removeprefix(begin), e["subject"]) for e in store.events if e["type"].startswith(begin)]


async def until(store: Agent, what: str, model_id: str) -> None:
    await eventually(lambda: (what, model_id) in told(store), what=lambda: f"{what}, not only {told(store)}")


async def test_into_memory_it_goes_by_the_ssd_and_a_lease_finds_it_there(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        assert await store.prefetch(model_id, Tier.DRAM, priority=3) == Done()
        await until(store, "done", model_id)
        assert [what for what, _ in told(store)] == ["queued", "started", "done"]
        assert [data["priority"] for data in store.said("prefetch.queued")] == [3]
        [done] = store.said("prefetch.done")
        assert (done["model"], done["tier"], done["bytes"]) == ("tiny", Tier.DRAM, weight_bytes(source))
        assert whole(store, model_id)
        assert [h.leases for h in store.held(Tier.DRAM)] == [0]
        assert await lease_right(store, model_id, source) is Tier.DRAM
    assert s3.weight_bytes == weight_bytes(source)


async def test_onto_the_ssd_it_takes_no_room_in_memory(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 3)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        assert await store.prefetch(model_id, Tier.SSD) == Done()
        await until(store, "done", model_id)
        assert whole(store, model_id)
        assert store.status(Tier.DRAM).used_bytes == 0
        assert await store.prefetch(model_id, Tier.SSD) == Done()
        await eventually(lambda: len(store.said("prefetch.done")) == 2, what="it is there already")
        assert await lease_right(store, model_id, source) is Tier.SSD
    assert s3.weight_bytes == weight_bytes(source)


async def test_progress_is_told_while_it_is_on_its_way(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.prefetch.PROGRESS_S", 0.05)
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        s3.held = {1}
        await store.prefetch(model_id, Tier.DRAM)
        await eventually(
            lambda: any(data["done_bytes"] == CHUNK_BYTES for data in store.said("prefetch.progress")), what="progress"
        )
        assert {data["bytes"] for data in store.said("prefetch.progress")} == {weight_bytes(source)}
        await s3.let_go()
        await until(store, "done", model_id)


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.SSD])
async def test_what_is_given_up_ends_and_what_came_of_it_is_of_use_later(
    tmp_path: Path, s3: HeldS3, tier: Tier
) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        s3.held = {0}
        await store.prefetch(model_id, tier)
        await eventually(lambda: len(chunk_files(store)) == 1, what="a chunk on the SSD")
        assert await store.cancel(model_id) == Done()
        await until(store, "cancelled", model_id)
        assert [data["reason"] for data in store.said("prefetch.cancelled")] == ["cancelled"]
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="its chunks are free")
        await eventually(lambda: s3.waiting == {0}, what="the request that was given up")
        assert await store.cancel(model_id) == Done(), "nothing is queued"
        await s3.let_go()
        assert await lease_right(store, model_id, source) is Tier.REMOTE
        assert store.said("prefetch.done") == []
    assert s3.weight_bytes == weight_bytes(source)


async def test_a_lease_outlives_the_prefetch_that_began_its_load(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        s3.held = {1}
        await store.prefetch(model_id, Tier.DRAM)
        await eventually(lambda: s3.waiting == {1}, what="it is on its way")
        async with leased(store, model_id) as (client, granted):
            await store.cancel(model_id)
            await until(store, "cancelled", model_id)
            await s3.let_go()
            assert await read(client, granted) == written(source)


async def test_what_cannot_be_had_is_told_by_its_type(tmp_path: Path, s3: HeldS3) -> None:
    for name in "abc":
        write_model(s3.folder(name), 3)
    async with agent(tmp_path, ssd_capacity_bytes=CHUNK_BYTES, **s3.settings) as store:
        denied, large = [(await store.register(s3.source(name), name)).model_id for name in "ab"]
        await store.prefetch(large, Tier.SSD)
        await until(store, "failed", large)
        s3.error = (403, "AccessDenied")
        await store.prefetch(denied, Tier.DRAM)
        await until(store, "failed", denied)
        await store.prefetch("model-none", Tier.DRAM)
        await until(store, "failed", "model-none")
        codes = [data["code"] for data in store.said("prefetch.failed")]
        assert codes == ["tier_full", "source_denied", "model_not_found"]
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="nothing stays")
        refusal = await store.prefetch(large, Tier.REMOTE)
        assert isinstance(refusal, Failed)
        assert (refusal.code, refusal.retryable) == ("invalid_request", False)


async def test_an_order_of_a_leader_who_leads_no_more_is_refused(tmp_path: Path, s3: HeldS3) -> None:
    write_model(s3.folder("m"), 1)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        assert await store.prefetch(model_id, Tier.SSD, term=5) == Done()
        await until(store, "done", model_id)
        for reply in (
            await store.prefetch(model_id, Tier.DRAM, term=4),
            await store.cancel(model_id, term=4),
            await store.evict(model_id, Tier.SSD, term=4),
        ):
            assert isinstance(reply, Failed)
            assert reply.code == "stale_term"
        assert [what for what, _ in told(store)] == ["queued", "started", "done"]
        assert whole(store, model_id)
        assert await store.evict(model_id, Tier.SSD, term=5) == Done()


async def test_what_is_leased_is_not_removed_and_afterwards_it_is(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 1)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        async with leased(store, model_id) as (client, granted):
            await read(client, granted)
            await copied(store, model_id)
            reply = await store.evict(model_id, Tier.DRAM)
            assert isinstance(reply, Failed)
            assert (reply.code, reply.retryable) == ("busy", True)
        await eventually(lambda: [h.leases for h in store.held(Tier.DRAM)] == [0], what="the end of the lease")
        assert await store.evict(model_id, Tier.DRAM) == Done()
        await eventually(lambda: dram(store) == [], what="it is gone from memory")
        assert await store.evict(model_id, Tier.DRAM) == Done(), "it is not here"
        assert whole(store, model_id)
        assert await store.evict(model_id, Tier.SSD) == Done()
        await eventually(lambda: store.held() == [], what="it is gone from the SSD")
        assert chunk_files(store) == []
        assert [data["reason"] for data in store.said("evicted")] == ["ordered", "ordered"]
        assert await lease_right(store, model_id, source) is Tier.REMOTE


async def test_who_asks_is_told_what_is_here_of_a_model(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, cluster_token="x" * 16, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        nothing = await store.locate(model_id)
        assert isinstance(nothing, Failed)
        assert nothing.code == "not_held"
        s3.held = {1}
        await store.prefetch(model_id, Tier.DRAM)
        await eventually(lambda: [h.held_bytes for h in store.held()] == [CHUNK_BYTES], what="a chunk")
        half = Located(
            node="n1",
            address=store.statuses[-1].address,
            held_bytes=CHUNK_BYTES,
            total_bytes=weight_bytes(source),
            receiving=True,
        )
        assert half.address.startswith("127.0.0.1:")
        assert await store.locate(model_id) == half
        await s3.let_go()
        await until(store, "done", model_id)
        located = await store.locate(model_id)
        assert isinstance(located, Located)
        assert (located.held_bytes, located.receiving) == (weight_bytes(source), False)


async def test_a_start_takes_the_room_of_a_prefetch_which_comes_again_later(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.prefetch.AGAIN_S", 0.1)
    sources = {name: write_model(s3.folder(name), 3, seed=ord(name)) for name in "ab"}
    async with agent(tmp_path, **s3.settings) as store:
        ahead, now = [(await store.register(s3.source(name), name)).model_id for name in sources]
        s3.held = {2}
        await store.prefetch(ahead, Tier.DRAM)
        await eventually(lambda: s3.waiting == {2}, what="it is on its way")
        async with leased(store, now) as (client, granted):
            await s3.let_go()
            assert await read(client, granted) == written(sources["b"])
            assert dram(store) == [now]
            assert store.told("evicted", Tier.DRAM) == [ahead]
            assert ("done", ahead) not in told(store)
        await until(store, "done", ahead)
        assert ("failed", ahead) not in told(store)
        assert await lease_right(store, ahead, sources["a"]) is Tier.DRAM


async def test_a_prefetch_never_takes_the_room_of_what_is_leased(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.prefetch.AGAIN_S", 0.02)
    monkeypatch.setattr("stoker_storeagent.prefetch.TRIES", 3)
    for name in "ab":
        write_model(s3.folder(name), 3, seed=ord(name))
    async with agent(tmp_path, **s3.settings) as store:
        used, ahead = [(await store.register(s3.source(name), name)).model_id for name in "ab"]
        async with leased(store, used) as (client, granted):
            await read(client, granted)
            await store.prefetch(ahead, Tier.DRAM)
            await until(store, "failed", ahead)
            assert [data["code"] for data in store.said("prefetch.failed")] == ["pool_exhausted"]
            assert dram(store) == [used]


async def test_orders_go_by_priority_and_one_whose_time_is_over_is_given_up(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.prefetch.AT_ONCE", 1)
    for name in "abcd":
        write_model(s3.folder(name), 1, seed=ord(name))
    async with agent(tmp_path, **s3.settings) as store:
        a, b, c, d = [(await store.register(s3.source(name), name)).model_id for name in "abcd"]
        s3.held = {0}
        await store.prefetch(a, Tier.SSD)
        await until(store, "started", a)
        await store.prefetch(b, Tier.SSD)
        await store.prefetch(c, Tier.SSD, priority=1)
        await store.prefetch(d, Tier.SSD, budget_ms=50)
        await until(store, "cancelled", d)
        assert [data["reason"] for data in store.said("prefetch.cancelled")] == ["deadline"]
        await s3.let_go()
        await until(store, "done", b)
        assert [model_id for what, model_id in told(store) if what == "done"] == [a, c, b]


async def test_an_order_takes_the_place_of_an_earlier_one(tmp_path: Path, s3: HeldS3) -> None:
    write_model(s3.folder("m"), 1)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        s3.held = {0}
        await store.prefetch(model_id, Tier.SSD)
        await until(store, "started", model_id)
        await store.prefetch(model_id, Tier.SSD, priority=7)  # a repeat
        await store.prefetch(model_id, Tier.DRAM)
        await s3.let_go()
        await until(store, "done", model_id)
        assert [what for what, _ in told(store)] == ["queued", "started", "cancelled", "queued", "started", "done"]
        assert [data["reason"] for data in store.said("prefetch.cancelled")] == ["replaced"]
        await eventually(lambda: dram(store) == [model_id], what="it is in memory")


async def test_a_model_that_is_deleted_leaves_all_tiers(
    tmp_path: Path, s3: HeldS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_storeagent.app.RECONCILE_S", 0.1)
    write_model(s3.folder("m"), 1)
    async with agent(tmp_path, **s3.settings) as store:
        model_id = (await store.register(s3.source("m"))).model_id
        await lease_once(store, model_id)
        await copied(store, model_id)
        await store.database.models.delete("tiny")
        await eventually(lambda: store.held() == store.held(Tier.DRAM) == [], what="it is gone")
        assert chunk_files(store) == []
        assert {data["reason"] for data in store.said("evicted")} == {"deleted"}
