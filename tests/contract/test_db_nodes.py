import asyncio

import pytest
from tests.support.databases import DatabaseKind

from stoker_contracts.models import Device, DeviceKind
from stoker_core.errors import NodeTaken, StaleTerm
from stoker_db.ports import Database, DrainRow, NodeRow

CPU = Device(index=0, kind=DeviceKind.CPU, name="cpu slot", memory_bytes=8 << 30)
GPU = Device(index=1, kind=DeviceKind.CUDA, name="H200", memory_bytes=139 << 30)


async def test_a_node_is_returned_as_it_registered_with_devices_by_index(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1", devices=(GPU, CPU)), replaces=None)
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-1", devices=(CPU, GPU))


async def test_a_node_without_devices_has_none(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1"), replaces=None)
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-1")


async def test_an_unknown_node_is_none(database: Database) -> None:
    assert await database.nodes.get("nowhere") is None
    assert await database.nodes.all() == []


async def test_all_nodes_come_ordered_by_name_each_with_its_own_devices(database: Database) -> None:
    for name, devices in (("b", (CPU,)), ("a", ()), ("c", (CPU, GPU))):
        await database.nodes.register(NodeRow(name=name, boot_id=f"boot-{name}", devices=devices), replaces=None)
    assert [(n.name, n.boot_id, n.devices) for n in await database.nodes.all()] == [
        ("a", "boot-a", ()),
        ("b", "boot-b", (CPU,)),
        ("c", "boot-c", (CPU, GPU)),
    ]


async def test_the_next_boot_takes_over_with_its_own_devices(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1", devices=(CPU, GPU)), replaces=None)
    await database.nodes.register(NodeRow(name="a", boot_id="boot-2", devices=(CPU,)), replaces="boot-1")
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-2", devices=(CPU,))


@pytest.mark.parametrize("replaces", [None, "boot-0"])
async def test_a_registration_that_replaces_another_boot_than_the_present_is_refused(
    database: Database, replaces: str | None
) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1", devices=(CPU,)), replaces=None)
    with pytest.raises(NodeTaken) as caught:
        await database.nodes.register(NodeRow(name="a", boot_id="boot-2", devices=(GPU,)), replaces=replaces)
    assert (caught.value.node, caught.value.boot_id) == ("a", "boot-1")
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-1", devices=(CPU,))


async def test_a_registration_that_replaces_a_boot_of_no_node_is_refused(database: Database) -> None:
    with pytest.raises(NodeTaken):
        await database.nodes.register(NodeRow(name="a", boot_id="boot-2"), replaces="boot-1")
    assert await database.nodes.get("a") is None


@pytest.mark.parametrize("replaces", [None, "boot-old"], ids=["new node", "next boot"])
async def test_of_simultaneous_registrations_one_wins_with_its_devices(
    database_kind: DatabaseKind, replaces: str | None
) -> None:
    database = database_kind.database
    if replaces:
        await database.nodes.register(NodeRow(name="a", boot_id=replaces, devices=(CPU, GPU)), replaces=None)
    rows = [
        NodeRow(
            name="a", boot_id=f"boot-{n}", devices=(Device(index=n, kind=DeviceKind.CPU, name="x", memory_bytes=n),)
        )
        for n in range(6)
    ]
    clients = [database, database_kind.other] * 3
    outcomes = await asyncio.gather(
        *(client.nodes.register(row, replaces=replaces) for client, row in zip(clients, rows, strict=True)),
        return_exceptions=True,
    )
    winners = [row for row, outcome in zip(rows, outcomes, strict=True) if outcome is None]
    assert sorted(type(o).__name__ for o in outcomes) == ["NodeTaken"] * 5 + ["NoneType"]
    assert await database.nodes.get("a") == winners[0]
    assert {o.boot_id for o in outcomes if isinstance(o, NodeTaken)} == {winners[0].boot_id}


async def test_a_node_that_leaves_is_forgotten_with_its_devices_and_may_come_back(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1", devices=(CPU,)), replaces=None)
    await database.nodes.leave("a", "boot-1")
    assert await database.nodes.all() == []
    await database.nodes.leave("a", "boot-1")
    await database.nodes.register(NodeRow(name="a", boot_id="boot-2"), replaces=None)
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-2")


async def test_an_old_boot_that_leaves_does_not_take_the_present_one_with_it(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1"), replaces=None)
    await database.nodes.register(NodeRow(name="a", boot_id="boot-2"), replaces="boot-1")
    await database.nodes.leave("a", "boot-1")
    assert await database.nodes.get("a") == NodeRow(name="a", boot_id="boot-2")


async def test_a_drained_node_stays_so_while_it_leaves_and_comes_back_until_it_is_undone(database: Database) -> None:
    await database.nodes.register(NodeRow(name="a", boot_id="boot-1"), replaces=None)
    await database.nodes.drain(DrainRow(node="b", term=0))
    await database.nodes.drain(DrainRow(node="a", term=0))
    await database.nodes.leave("a", "boot-1")
    await database.nodes.register(NodeRow(name="a", boot_id="boot-2"), replaces=None)
    assert await database.nodes.drains() == [DrainRow(node="a", term=0), DrainRow(node="b", term=0)]
    await database.nodes.drain(DrainRow(node="a", term=0, drained=True))
    assert [row.drained for row in await database.nodes.drains()] == [True, False]
    assert await database.nodes.undrain("a", term=0)
    assert not await database.nodes.undrain("a", term=0)
    assert [row.node for row in await database.nodes.drains()] == ["b"]


async def test_a_superseded_leader_drains_nothing_and_undoes_nothing(database: Database) -> None:
    leader, successor = database.leadership(), database.leadership()
    assert await leader.acquire("first") == 1
    await database.nodes.drain(DrainRow(node="a", term=1))
    await leader.release()
    assert await successor.acquire("second") == 2
    with pytest.raises(StaleTerm) as caught:
        await database.nodes.drain(DrainRow(node="b", term=1))
    assert (caught.value.term, caught.value.highest) == (1, 2)
    with pytest.raises(StaleTerm):
        await database.nodes.undrain("a", term=1)
    assert await database.nodes.drains() == [DrainRow(node="a", term=1)]
    await successor.release()
