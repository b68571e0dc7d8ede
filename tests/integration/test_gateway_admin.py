"""The admin API on real NATS and Postgres; a scripted storage agent answers registrations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.databases import a_decision
from tests.support.fake_instance import model_spec
from tests.support.gateway_rig import Rig, gateway_rig, tokenizer_files, tokens_of

from stoker_bus.port import Message, answer, send
from stoker_contracts import subjects
from stoker_contracts.codec import decode
from stoker_contracts.control import (
    CommandReply,
    Done,
    Failed,
    HeldModel,
    LinkStatus,
    Registered,
    RegisterModel,
    StoreStatus,
    TierStatus,
    WantDrain,
    WantPrefetch,
)
from stoker_contracts.decisions import Outcome
from stoker_contracts.models import EngineKind, InstanceState, Tier
from stoker_db.ports import DrainRow, InstanceRow, NodeRow, Placement


@pytest.fixture
async def rig(nats_url: str, postgres_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    async with gateway_rig(nats_url, postgres_url, tmp_path, register_timeout_s=1.0) as rig:
        yield rig


async def store_says(rig: Rig, node: str, reply: Failed | None = None) -> list[RegisterModel]:
    """A storage agent on `node`, live; registers what it is asked for, or answers `reply`."""
    asked: list[RegisterModel] = []

    async def register(message: Message) -> None:
        wanted: RegisterModel = decode(RegisterModel, message.data)
        asked.append(wanted)
        if reply is not None:
            await answer(rig.bus, message, reply)
            return
        spec = model_spec(wanted.name, source=wanted.source)
        await rig.database.models.add(spec, tokenizer_files())
        await answer(rig.bus, message, Registered(model=spec, created=True, files=4, total_bytes=5000))

    await rig.bus.subscribe(subjects.store_register(node), register)
    status = StoreStatus(
        node=node,
        boot_id="s1",
        seq=1,
        tiers=(TierStatus(tier=Tier.SSD, capacity_bytes=100, used_bytes=10, read_bytes_per_s=5.0),),
        held=(HeldModel(model_id=rig.spec.model_id, tier=Tier.SSD, held_bytes=600, total_bytes=1200),),
        address="here:1",
        links=(LinkStatus(peer="node-z", read_bytes_per_s=7.0),),
    )
    await send(rig.bus, subjects.status_store(node), status)
    return asked


BODY = {"name": "new", "source": "file:///models/new", "options": {"engine": "sim", "slots": 3}}


async def test_a_model_is_registered_by_the_storage_agent_and_served_at_once(rig: Rig) -> None:
    asked = await store_says(rig, "node-a")
    status, body, _ = await rig.post("/admin/v1/models", {**BODY, "node": "node-a"})
    assert status == 201
    assert body["created"] is True
    assert body["model"]["name"] == "new"  # type: ignore[index]
    assert body["model"]["keep_alive_s"] == 60.0  # type: ignore[index]
    assert asked[0].options.engine is EngineKind.SIM
    assert asked[0].options.slots == 3
    assert (await rig.client.models.retrieve("new")).id == "new"


async def test_without_a_node_the_first_live_one_is_asked(rig: Rig) -> None:
    status, body, response = await rig.post("/admin/v1/models", BODY)
    assert status == 503
    assert body["error"]["code"] == "no_node"  # type: ignore[index]
    assert response.headers["Retry-After"]
    asked = {node: await store_says(rig, node) for node in ("node-b", "node-a")}
    await _until_nodes(rig, 2)
    status, _, _ = await rig.post("/admin/v1/models", BODY)
    assert status == 201
    assert (len(asked["node-a"]), len(asked["node-b"])) == (1, 0)


async def test_a_node_that_just_left_is_passed_over(rig: Rig) -> None:
    left = StoreStatus(node="node-a", boot_id="s1", seq=1, tiers=())
    await send(rig.bus, subjects.status_store("node-a"), left)
    asked = await store_says(rig, "node-b")
    await _until_nodes(rig, 2)
    status, _, _ = await rig.post("/admin/v1/models", BODY)
    assert (status, len(asked)) == (201, 1)


async def test_a_node_that_is_not_there_is_503(rig: Rig) -> None:
    status, body, _ = await rig.post("/admin/v1/models", {**BODY, "node": "absent"})
    assert (status, body["error"]["code"]) == (503, "no_responders")  # type: ignore[index]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("refused_checkpoint", 400),
        ("corrupt_checkpoint", 400),
        ("invalid_model_name", 400),
        ("source_denied", 403),
        ("model_exists", 409),
        ("source_unavailable", 502),
    ],
)
async def test_a_refused_registration_says_why(rig: Rig, code: str, expected: int) -> None:
    await store_says(rig, "node-a", Failed(code=code, message="the reason"))
    status, body, _ = await rig.post("/admin/v1/models", {**BODY, "node": "node-a"})
    assert status == expected
    assert (body["error"]["code"], body["error"]["message"]) == (code, "the reason")  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": 5}, "name"),
        ({"name": None}, "name"),
        ({"source": None}, "source"),
        ({"options": 5}, "options"),
        ({"options": {"slots": "many"}}, "options.slots"),
        ({"options": {"made_up": 1}}, "options.made_up"),
        ({"node": "a.b"}, "node"),
        ({"made_up": 1}, "made_up"),
    ],
)
async def test_a_bad_registration_names_its_field(rig: Rig, change: dict[str, object], param: str) -> None:
    await store_says(rig, "node-a")
    status, body, _ = await rig.post("/admin/v1/models", {**BODY, "node": "node-a", **change})
    assert status == 400
    assert body["error"]["param"] == param  # type: ignore[index]


async def test_models_show_their_instances_and_tiers(rig: Rig) -> None:
    await store_says(rig, "node-a")
    await _until_nodes(rig, 1)
    await rig.node.add("i1", rig.spec, tokens_of("x"))
    await rig.client.completions.create(model="tiny", prompt="x")
    (model,) = (await (await rig.http.get("/admin/v1/models")).json())["models"]
    assert model["name"] == "tiny"
    assert model["engine"] == "vllm"
    assert [(i["instance_id"], i["node"], i["state"]) for i in model["instances"]] == [("i1", "node-a", "ready")]
    assert model["tiers"] == [{"node": "node-a", "tier": "ssd", "held_bytes": 600, "total_bytes": 1200}]


async def test_what_live_agents_hold_goes_before_what_the_database_remembers_of_them(rig: Rig) -> None:
    await store_says(rig, "node-b")
    await _until_nodes(rig, 1)
    for node, tier, held_bytes in (("node-b", Tier.SSD, 1), ("node-b", Tier.DRAM, 2), ("away", Tier.SSD, 3)):
        placement = Placement(model_id=rig.spec.model_id, node=node, tier=tier, held_bytes=held_bytes)
        await rig.database.tiers.place(placement)
    (model,) = (await (await rig.http.get("/admin/v1/models")).json())["models"]
    assert model["tiers"] == [
        {"node": "away", "tier": "ssd", "held_bytes": 3, "total_bytes": rig.spec.weight_bytes},
        {"node": "node-b", "tier": "ssd", "held_bytes": 600, "total_bytes": 1200},
    ]


async def leader_says(rig: Rig, reply: CommandReply) -> list[WantPrefetch]:
    """A scheduler that leads, and answers every wish so."""
    asked: list[WantPrefetch] = []

    async def want(message: Message) -> None:
        asked.append(decode(WantPrefetch, message.data))
        await answer(rig.bus, message, reply)

    await rig.bus.subscribe(subjects.SCHEDULER_PREFETCH, want)
    return asked


async def test_a_prefetch_is_handed_to_the_leader_and_accepted(rig: Rig) -> None:
    asked = await leader_says(rig, Done())
    wish = {"nodes": ["node-a"], "tier": "ssd", "priority": -2, "budget_ms": 500}
    status, body, _ = await rig.post("/admin/v1/models/tiny/prefetch", wish)
    assert (status, body) == (202, {"model": "tiny", "model_id": rig.spec.model_id, "cancel": False, **wish})
    status, body, _ = await rig.post("/admin/v1/models/tiny/prefetch", b"")
    assert (status, body["nodes"], body["tier"]) == (202, [], "dram")
    assert asked == [
        WantPrefetch(
            model_id=rig.spec.model_id, nodes=("node-a",), tier=Tier.SSD, priority=-2, budget_ms=500, cancel=False
        ),
        WantPrefetch(model_id=rig.spec.model_id),
    ]


async def test_a_prefetch_is_cancelled_on_the_nodes_that_are_named(rig: Rig) -> None:
    asked = await leader_says(rig, Done())
    response = await rig.http.delete("/admin/v1/models/tiny/prefetch?node=node-a&node=node-b")
    assert (response.status, (await response.json())["cancel"]) == (202, True)
    assert asked == [WantPrefetch(model_id=rig.spec.model_id, nodes=("node-a", "node-b"), cancel=True)]
    assert (await rig.http.delete("/admin/v1/models/tiny/prefetch?node=a.b")).status == 400


async def test_what_the_leader_refuses_says_why(rig: Rig) -> None:
    await leader_says(rig, Failed(code="no_node", message="no storage agent is live", retryable=True))
    status, body, response = await rig.post("/admin/v1/models/tiny/prefetch", {})
    assert status == 503
    assert response.headers["Retry-After"]
    assert (body["error"]["code"], body["error"]["message"]) == ("no_node", "no storage agent is live")  # type: ignore[index]


async def test_without_a_leader_a_prefetch_is_503(rig: Rig) -> None:
    status, body, _ = await rig.post("/admin/v1/models/tiny/prefetch", {})
    assert (status, body["error"]["code"]) == (503, "no_responders")  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"nodes": "node-a"}, "nodes"),
        ({"nodes": [1]}, "nodes"),
        ({"nodes": ["a.b"]}, "nodes"),
        ({"nodes": ["n"] * 257}, "nodes"),
        ({"tier": "gpu"}, "tier"),
        ({"tier": 1}, "tier"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 1001}, "priority"),
        ({"budget_ms": -1}, "budget_ms"),
        ({"made_up": 1}, "made_up"),
    ],
)
async def test_a_bad_prefetch_names_its_field_and_asks_nobody(rig: Rig, body: dict[str, object], param: str) -> None:
    asked = await leader_says(rig, Done())
    status, answered, _ = await rig.post("/admin/v1/models/tiny/prefetch", body)
    assert (status, answered["error"]["param"]) == (400, param)  # type: ignore[index]
    assert asked == []


async def test_a_prefetch_of_an_unknown_model_is_404(rig: Rig) -> None:
    assert (await rig.post("/admin/v1/models/absent/prefetch", {}))[0] == 404
    assert (await rig.http.delete("/admin/v1/models/absent/prefetch")).status == 404


async def test_a_model_in_an_object_store_is_registered_by_any_live_agent(rig: Rig) -> None:
    asked = await store_says(rig, "node-a")
    await _until_nodes(rig, 1)
    status, _, _ = await rig.post("/admin/v1/models", {**BODY, "source": "s3://bucket/some/prefix"})
    assert (status, asked[0].source) == (201, "s3://bucket/some/prefix")


async def test_a_deleted_model_is_gone_at_once(rig: Rig) -> None:
    response = await rig.http.delete("/admin/v1/models/tiny")
    assert (response.status, (await response.json())["deleted"]) == (200, True)
    assert (await rig.http.get("/v1/models/tiny")).status == 404
    assert (await rig.http.delete("/admin/v1/models/tiny")).status == 404


async def test_instances_come_from_workers_and_from_the_database(rig: Rig) -> None:
    term = await rig.database.leadership().acquire("test") or 0
    for number in (1, 2):
        row = InstanceRow(
            instance_id=f"i{number}",
            model_id=rig.spec.model_id,
            node="node-a",
            boot_id="boot-1",
            devices=(0,),
            desired=InstanceState.READY,
            actual=InstanceState.STARTING,
            term=term,
        )
        await rig.database.instances.desire(row)
    await rig.node.add("i2", rig.spec, tokens_of("x"))
    await rig.client.completions.create(model="tiny", prompt="x")
    found = (await (await rig.http.get("/admin/v1/instances")).json())["instances"]
    assert {i["instance_id"]: i["state"] for i in found} == {"i1": "starting", "i2": "ready"}
    assert {i["model"] for i in found} == {"tiny"}


async def test_nodes_show_what_lives_and_what_is_only_registered(rig: Rig) -> None:
    await store_says(rig, "node-a")
    await rig.database.nodes.register(NodeRow(name="away", boot_id="b"), replaces=None)
    await _until_nodes(rig, 1)
    await rig.node.report()
    nodes = {n["node"]: n for n in (await (await rig.http.get("/admin/v1/nodes")).json())["nodes"]}
    assert not nodes["away"]["live"]
    assert nodes["node-a"]["store_live"]
    assert nodes["node-a"]["tiers"][0]["read_bytes_per_s"] == 5.0
    assert nodes["node-a"]["address"] == "here:1"
    assert nodes["node-a"]["links"] == [{"peer": "node-z", "read_bytes_per_s": 7.0, "read_bytes": 0}]
    assert nodes["away"]["links"] == []


async def _until_nodes(rig: Rig, count: int) -> None:
    """Wait until the gateway has heard `count` storage agents."""
    for _ in range(500):
        nodes = (await (await rig.http.get("/admin/v1/nodes")).json())["nodes"]
        if sum(node["store_live"] for node in nodes) == count:
            return
    raise AssertionError(f"{count} storage agents were not heard")


async def scheduler_says(rig: Rig, reply: CommandReply) -> list[WantDrain]:
    """A leader that answers requests to drain; it stores nothing."""
    asked: list[WantDrain] = []

    async def on_want(message: Message) -> None:
        asked.append(decode(WantDrain, message.data))
        await answer(rig.bus, message, reply)

    await rig.bus.subscribe(subjects.SCHEDULER_DRAIN, on_want)
    return asked


async def test_a_drain_is_handed_to_the_leader_and_its_progress_told(rig: Rig) -> None:
    asked = await scheduler_says(rig, Done())
    await rig.node.add("i1", rig.spec, state=InstanceState.READY)
    await rig.node.add("i2", rig.spec, state=InstanceState.FAILED)
    async with asyncio.timeout(10):
        while len((await (await rig.http.get("/admin/v1/instances")).json())["instances"]) < 2:
            await asyncio.sleep(0.02)
    await rig.database.nodes.drain(DrainRow(node="node-a", term=0))
    status, body, _ = await rig.post("/admin/v1/nodes/node-a/drain", b"")
    expected = {
        "node": "node-a",
        "draining": True,
        "drained": False,
        "live": True,
        "instances": [{"instance_id": "i1", "model": "tiny", "state": "ready", "running": 0}],
    }
    assert (status, body) == (202, expected)
    await rig.database.nodes.undrain("node-a", term=0)
    response = await rig.http.delete("/admin/v1/nodes/node-a/drain")
    assert (response.status, (await response.json())["draining"]) == (202, False)
    assert asked == [WantDrain(node="node-a"), WantDrain(node="node-a", undo=True)]
    progress = await (await rig.http.get("/admin/v1/nodes/node-z/drain")).json()
    assert (progress["draining"], progress["live"], progress["instances"]) == (False, False, [])


async def test_a_drain_that_the_leader_refuses_says_why(rig: Rig) -> None:
    assert (await rig.post("/admin/v1/nodes/a.b/drain", b""))[0] == 400
    status, body, _ = await rig.post("/admin/v1/nodes/node-a/drain", b"")
    assert (status, body["error"]["code"]) == (503, "no_responders")  # type: ignore[index]
    await scheduler_says(rig, Failed(code="no_node", message="no node is called 'node-a'"))
    status, body, _ = await rig.post("/admin/v1/nodes/node-a/drain", b"")
    assert (status, body["error"]["code"]) == (503, "no_node")  # type: ignore[index]


async def test_decisions_are_told_by_model_and_by_instance_with_how_far_they_were_off(rig: Rig) -> None:
    for number in range(3):
        record = a_decision(f"d{number}", model_id=rig.spec.model_id, instance_id=f"i{number}")
        await rig.database.decisions.add(record)
    await rig.database.decisions.conclude("i1", Outcome(queue_s=0.0, load_s=1.0, engine_s=1.5, total_s=2.5))
    body = await (await rig.http.get("/admin/v1/models/tiny/decisions?limit=2")).json()
    newest, older = body["decisions"]
    assert [d["decision_id"] for d in (newest, older)] == ["d2", "d1"]
    assert (newest["outcome"], newest["error"], newest["load_error"]) == (None, None, None)
    assert older["model"] == "tiny"
    assert older["options"][0]["startup"]["queue_s"] == 0.25
    assert older["options"][0]["startup"]["room_s"] == 0.0
    assert older["error"] == pytest.approx(0.5 / 2.5)
    assert older["load_error"] == pytest.approx(0.25)
    body = await (await rig.http.get("/admin/v1/instances/i1/decisions")).json()
    assert body["decisions"] == [older]
    metrics = await (await rig.http.get("/metrics")).text()
    assert 'stoker_start_prediction_error_ratio{part="total",quantile="0.5"} 0.2' in metrics
    assert 'stoker_start_prediction_error_ratio{part="load",quantile="0.9"} 0.25' in metrics
    assert "stoker_start_predictions 1.0" in metrics


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("models/absent/decisions", 404, "model_not_found"),
        ("instances/absent/decisions", 404, "instance_not_found"),
        ("models/tiny/decisions?limit=0", 400, "invalid_request"),
        ("models/tiny/decisions?limit=x", 400, "invalid_request"),
        ("models/tiny/decisions?limit=99999999999", 400, "invalid_request"),
    ],
)
async def test_decisions_that_are_not_there_are_refused_by_name(rig: Rig, path: str, status: int, code: str) -> None:
    response = await rig.http.get(f"/admin/v1/{path}")
    assert (response.status, (await response.json())["error"]["code"]) == (status, code)
