"""What a source can do wrong: who waits hears of it with its type, nothing of it stays, and once it is well all is well."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from tests.support.held_s3 import BUCKET, HeldS3, held_s3
from tests.support.leasing import (
    SHARD,
    assert_nothing_torn,
    copied,
    failure,
    lease_right,
    leased,
    read,
    refused,
    weight_bytes,
    write_model,
    written,
)
from tests.support.services import eventually
from tests.support.storeagent_rig import agent

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_contracts.models import Tier
from stoker_core.errors import SourceUnavailable
from stoker_storeagent import app
from stoker_storeagent.sources.s3 import S3Settings

MIB = 2**20


@pytest.fixture
async def s3(tmp_path: Path) -> AsyncIterator[HeldS3]:
    async with held_s3(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker_storeagent.origins.PAUSE_S", 0.001)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "S3Settings", partial(S3Settings, stall_s=0.5, connect_s=0.5))
    monkeypatch.setattr("stoker_storeagent.origins.TRIES", 2)


@pytest.mark.parametrize("answer", [(500, "InternalError"), (503, "SlowDown"), (429, "Throttling")])
async def test_a_source_that_fails_for_a_while_is_asked_again(
    tmp_path: Path, s3: HeldS3, answer: tuple[int, str]
) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.errors = [answer] * 4
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        assert s3.errors == []
        await copied(store, spec.model_id)
        assert store.said("refused") == []
    assert s3.weight_bytes == weight_bytes(source)


async def test_a_body_that_breaks_off_goes_on_where_it_broke_off(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.cut_after = 5 * MIB
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await copied(store, spec.model_id)
        assert_nothing_torn(store)
    assert {span.offset for span in s3.spans if span.size_bytes >= MIB} >= {5 * MIB, 10 * MIB, 15 * MIB, CHUNK_BYTES}
    assert s3.weight_bytes == weight_bytes(source)


@pytest.mark.usefixtures("_impatient")
async def test_a_source_that_stalls_is_asked_again_for_the_rest(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 1)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.stall_after = 3 * MIB
        async with leased(store, spec.model_id) as (client, granted):
            await eventually(lambda: s3.weight_bytes > 0, what="the first bytes")
            s3.stall_after = None
            assert await read(client, granted) == written(source)
    assert s3.weight_bytes == weight_bytes(source)


def stall(s3: HeldS3) -> None:
    s3.stall_after = 0


def silence(s3: HeldS3) -> None:
    s3.silent = True


def whole(s3: HeldS3) -> None:
    s3.whole = True


def cut(s3: HeldS3) -> None:
    s3.cut_after = 0


def fail(s3: HeldS3) -> None:
    s3.error = (500, "InternalError")


def slow_down(s3: HeldS3) -> None:
    s3.error = (503, "SlowDown")


def deny(s3: HeldS3) -> None:
    s3.error = (403, "AccessDenied")


def lose(s3: HeldS3) -> None:
    s3.missing = {f"m/{SHARD}"}


def change(s3: HeldS3) -> None:
    s3.salts = ["", "another"]  # the first chunk comes, and then there is another object


def heal(s3: HeldS3) -> None:
    s3.silent = s3.whole = False
    s3.error = s3.cut_after = s3.stall_after = None
    s3.salt, s3.salts, s3.missing = "", [], set()


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (fail, "source_unavailable"),
        (slow_down, "source_unavailable"),
        (silence, "source_unavailable"),
        (stall, "source_unavailable"),
        (cut, "source_unavailable"),
        (whole, "source_unavailable"),
        (change, "checkpoint_changed"),
        (lose, "refused_checkpoint"),
        (deny, "source_denied"),
    ],
)
async def test_a_fault_that_lasts_is_told_by_its_type_and_the_next_lease_after_it_works(
    tmp_path: Path, s3: HeldS3, fault: Callable[[HeldS3], None], code: str
) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, fetches_at_once=1, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        fault(s3)
        error = await failure(store, spec.model_id, SourceUnavailable)
        assert error.retryable
        await refused(store, code)
        [data] = [data for data in store.said("refused") if data["tier"] == Tier.DRAM]
        assert BUCKET in data["message"]
        assert "AKIA" not in data["message"]
        assert_nothing_torn(store)
        await eventually(lambda: store.status(Tier.DRAM).used_bytes == 0, what="its chunks are free")
        assert store.status(Tier.REMOTE).misses == 1
        heal(s3)
        assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
        await copied(store, spec.model_id)
        assert_nothing_torn(store)


async def test_an_object_that_became_shorter_is_another_one(tmp_path: Path, s3: HeldS3) -> None:
    source = write_model(s3.folder("m"), 2)
    data = (source / SHARD).read_bytes()
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        (source / SHARD).write_bytes(data[: CHUNK_BYTES + MIB])
        await failure(store, spec.model_id, SourceUnavailable)
        await refused(store, "checkpoint_changed")
        assert_nothing_torn(store)


async def test_who_waits_is_failed_with_the_source_and_who_comes_meanwhile_begins_anew(
    tmp_path: Path, s3: HeldS3
) -> None:
    source = write_model(s3.folder("m"), 2)
    async with agent(tmp_path, **s3.settings) as store:
        spec = await store.register(s3.source("m"))
        s3.held = {1}
        async with leased(store, spec.model_id) as (first, grant), leased(store, spec.model_id) as (second, other):
            await eventually(lambda: s3.waiting == {1}, what="the last chunk is asked for")
            s3.salt = "another"
            s3.cut_after = 0
            await s3.let_go()
            for client, granted in ((first, grant), (second, other)):
                with pytest.raises(SourceUnavailable):
                    await read(client, granted)
            s3.salt, s3.cut_after = "", None
            assert await lease_right(store, spec.model_id, source) is Tier.REMOTE
