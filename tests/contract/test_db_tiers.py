import pytest
from tests.support.databases import DatabaseKind, a_model, execute

from stoker_contracts.control import LinkStatus, TierStatus
from stoker_contracts.models import Tier
from stoker_db.pg import PgDatabase
from stoker_db.ports import Database, LoadObservation, Placement


def held(model: str, node: str, tier: Tier, held_bytes: int) -> Placement:
    return Placement(model_id=f"model-{model}", node=node, tier=tier, held_bytes=held_bytes)


def status(tier: Tier, used_bytes: int) -> TierStatus:
    return TierStatus(
        tier=tier, capacity_bytes=1 << 42, used_bytes=used_bytes, hits=1, misses=2, queue=3, read_bytes_per_s=1.5e9
    )


def link(peer: str, read_bytes: int) -> LinkStatus:
    return LinkStatus(peer=peer, read_bytes_per_s=1.25e9, read_bytes=read_bytes)


def load(model: str) -> LoadObservation:
    return LoadObservation(
        model_id=model,
        node="a",
        source=Tier.PEER,
        read_bytes=269_000_000_000,
        load_ms=412.5,
        wait_ms=0.25,
        origin="node-b",
    )


@pytest.fixture
async def models(database: Database) -> None:
    for name in ("x", "y"):
        await database.models.add(a_model(name), [])


@pytest.mark.usefixtures("models")
async def test_placements_come_by_model_node_and_tier(database: Database) -> None:
    rows = [held("x", "a", Tier.DRAM, 1 << 40), held("x", "a", Tier.SSD, 2), held("x", "b", Tier.SSD, 3)]
    rows.append(held("y", "a", Tier.SSD, 4))
    for row in reversed(rows):
        await database.tiers.place(row)
    assert await database.tiers.placements() == rows
    assert await database.tiers.placements("model-y") == rows[3:]
    assert await database.tiers.placements("model-z") == []


@pytest.mark.usefixtures("models")
async def test_a_placement_is_replaced_and_at_zero_bytes_removed(database: Database) -> None:
    other = held("y", "a", Tier.SSD, 7)
    for placement in (other, held("x", "a", Tier.SSD, 1), held("x", "a", Tier.SSD, 2)):
        await database.tiers.place(placement)
    assert await database.tiers.placements("model-x") == [held("x", "a", Tier.SSD, 2)]
    for _ in range(2):
        await database.tiers.place(held("x", "a", Tier.SSD, 0))
        assert await database.tiers.placements() == [other]


async def test_a_placement_of_a_model_that_is_gone_is_left_out(database: Database) -> None:
    await database.tiers.place(held("gone", "a", Tier.SSD, 1))
    assert await database.tiers.placements() == []


async def test_latest_is_the_newest_sample_of_each_tier_of_each_node(database: Database) -> None:
    await database.tiers.sample("b", [status(Tier.SSD, 1)])
    await database.tiers.sample("a", [status(Tier.SSD, 2), status(Tier.DRAM, 3)])
    await database.tiers.sample("a", [status(Tier.SSD, 4)])
    await database.tiers.sample("a", [])
    assert await database.tiers.latest() == [
        ("a", status(Tier.DRAM, 3)),
        ("a", status(Tier.SSD, 4)),
        ("b", status(Tier.SSD, 1)),
    ]


async def test_without_samples_there_is_no_latest(database: Database) -> None:
    assert await database.tiers.latest() == []


async def test_links_are_the_newest_sample_of_each_peer_of_each_node(database: Database) -> None:
    await database.tiers.sample("b", [], [link("a", 1)])
    await database.tiers.sample("a", [status(Tier.SSD, 2)], [link("c", 2), link("b", 3)])
    await database.tiers.sample("a", [status(Tier.SSD, 4)], [link("c", 1 << 50)])
    assert await database.tiers.links() == [("a", link("b", 3)), ("a", link("c", 1 << 50)), ("b", link("a", 1))]
    assert await database.tiers.latest() == [("a", status(Tier.SSD, 4))]


async def test_a_sample_is_stored_wholly_or_not_at_all(postgres_url: str) -> None:
    await execute(postgres_url, "ALTER TABLE link_metrics ADD CONSTRAINT no_links CHECK (peer <> 'b')")
    database = await PgDatabase.connect(postgres_url)
    with pytest.raises(Exception, match="no_links"):
        await database.tiers.sample("a", [status(Tier.SSD, 1)], [link("b", 1)])
    assert await database.tiers.latest() == []
    await database.close()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("tier", Tier)
async def test_every_tier_can_be_stored(database: Database, tier: Tier) -> None:
    await database.tiers.place(held("x", "a", tier, 1))
    await database.tiers.sample("a", [status(tier, 1)])
    seen = LoadObservation(model_id="x", node="a", source=tier, read_bytes=1, load_ms=1.0, wait_ms=1.0)
    await database.tiers.observe(seen)
    assert await database.tiers.observations() == [seen]


async def test_observations_come_newest_first_and_no_more_than_asked_for(database: Database) -> None:
    for model in ("1", "2", "3"):
        await database.tiers.observe(load(model))
    assert await database.tiers.observations() == [load("3"), load("2"), load("1")]
    assert await database.tiers.observations(1) == [load("3")]


async def test_pruning_deletes_what_is_older_and_counts_it(database_kind: DatabaseKind) -> None:
    tiers = database_kind.database.tiers
    await tiers.sample("a", [status(Tier.SSD, 1), status(Tier.DRAM, 1)], [link("b", 1)])
    await tiers.observe(load("old"))
    await database_kind.age(3600)
    await tiers.sample("a", [status(Tier.SSD, 2)], [link("c", 1)])
    await tiers.observe(load("new"))
    assert await tiers.prune(keep_s=7200) == 0
    assert await tiers.prune(keep_s=1800) == 4
    assert await tiers.links() == [("a", link("c", 1))]
    assert await tiers.latest() == [("a", status(Tier.SSD, 2))]
    assert await tiers.observations() == [load("new")]
    assert await tiers.prune(keep_s=0) == 3
    assert await tiers.prune(keep_s=0) == 0
