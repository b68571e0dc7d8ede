"""The admin API: models, instances, nodes. Without authentication: it is for a loopback address."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from stoker_bus.events import EventPublisher
from stoker_bus.port import Bus, ask
from stoker_contracts import subjects
from stoker_contracts.control import (
    CommandReply,
    Failed,
    InstanceStatus,
    RegisterModel,
    RegisterReply,
    StoreStatus,
    WantPrefetch,
)
from stoker_contracts.events import MODEL_DELETED
from stoker_contracts.models import ModelOptions, ModelSpec, Tier
from stoker_core.errors import InvalidRequest, NoNode, NoResponders
from stoker_db.ports import Database, InstanceRow, Placement
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.newest import Newest
from stoker_gateway.openai.errors import error_body, status_of
from stoker_gateway.openai.fields import Fields, decode_object
from stoker_gateway.routes import Routes
from stoker_gateway.web.middleware import json_response

_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
INSTANCES_MAX = 100  # ended ones included
NODES_MAX = 256  # in one prefetch
PRIORITY_MAX = 1000  # either way
BUDGET_MS_MAX = 24 * 3600 * 1000
PREFETCH_TIMEOUT_S = 15.0  # the leader may read the models again first


@dataclass(frozen=True)
class AdminRoutes:
    bus: Bus
    database: Database
    catalogue: Catalogue
    live: Routes
    stores: Newest[StoreStatus]
    events: EventPublisher
    register_timeout_s: float

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/admin/v1/models", self.register),
            web.get("/admin/v1/models", self.models),
            web.delete("/admin/v1/models/{name}", self.delete),
            web.post("/admin/v1/models/{name}/prefetch", self.prefetch),
            web.delete("/admin/v1/models/{name}/prefetch", self.cancel_prefetch),
            web.get("/admin/v1/instances", self.instances),
            web.get("/admin/v1/nodes", self.nodes),
        ]

    async def register(self, request: web.Request) -> web.StreamResponse:
        """{name, source, options?, node?} → 201 (200 if it was registered already) {model, created, files, total_bytes}."""
        fields = Fields(decode_object(await request.read()))
        message = RegisterModel(
            name=fields.required_string("name"),
            source=fields.required_string("source"),
            options=_options(fields),
        )
        node = fields.string("node")
        fields.refuse_rest()
        if node is not None:
            check_node(node, "node")
        reply = await self._registered([node] if node else [store.node for store in self.stores.all()], message)
        if isinstance(reply, Failed):
            return refused(reply)
        await self.catalogue.refresh()
        placements = await self.database.tiers.placements(reply.model.model_id)
        answer = {
            "model": self._model(reply.model, self._held().get(reply.model.model_id, []), placements),
            "created": reply.created,
            "files": reply.files,
            "total_bytes": reply.total_bytes,
        }
        return json_response(answer, 201 if reply.created else 200)

    async def _registered(self, nodes: Sequence[str], message: RegisterModel) -> RegisterReply:
        """By the first of these whose storage agent listens: one that left may still count as live. Raises NoNode, BusError."""
        gone = NoNode("no storage agent is live; start a node first")
        for node in nodes:
            try:
                reply: RegisterReply = await ask(
                    self.bus, subjects.store_register(node), message, RegisterReply, timeout_s=self.register_timeout_s
                )
            except NoResponders as error:
                if len(nodes) == 1:
                    raise
                gone = NoNode(f"no storage agent listens any more: {error.message}")
                continue
            return reply
        raise gone

    async def models(self, request: web.Request) -> web.StreamResponse:
        """{models: [specification, instances: […], tiers: [{node, tier, held_bytes, total_bytes}]]}.

        tiers: as live storage agents say, also of what is there in part; of silent ones as the database has it.
        """
        placements: dict[str, list[Placement]] = defaultdict(list)
        for placement in await self.database.tiers.placements():
            placements[placement.model_id].append(placement)
        specs = await self.database.models.all()
        held = self._held()
        found = [self._model(spec, held.get(spec.model_id, []), placements[spec.model_id]) for spec in specs]
        return json_response({"models": found})

    async def prefetch(self, request: web.Request) -> web.StreamResponse:
        """{nodes?, tier?, priority?, budget_ms?} → 202: the scheduler has ordered it. nodes: empty or absent: all live ones."""
        fields = Fields(decode_object(await request.read() or b"{}"))
        want = WantPrefetch(
            model_id=self.catalogue.get(request.match_info["name"]).model_id,
            nodes=fields.strings("nodes", most=NODES_MAX),
            tier=_tier(fields),
            priority=fields.integer("priority", least=-PRIORITY_MAX, most=PRIORITY_MAX) or 0,
            budget_ms=fields.integer("budget_ms", least=0, most=BUDGET_MS_MAX) or 0,
        )
        fields.refuse_rest()
        return await self._want(request, want)

    async def cancel_prefetch(self, request: web.Request) -> web.StreamResponse:
        """?node=…&node=… → 202: the scheduler has ordered those nodes, or all live ones, to give it up."""
        nodes = tuple(request.query.getall("node", []))
        if len(nodes) > NODES_MAX:
            raise InvalidRequest(f"node: may be given at most {NODES_MAX} times", "node")
        model_id = self.catalogue.get(request.match_info["name"]).model_id
        return await self._want(request, WantPrefetch(model_id=model_id, nodes=nodes, cancel=True))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Forget a model. Its instances stop when the scheduler notices; its files leave the tiers when room is needed."""
        spec = await self.database.models.delete(request.match_info["name"])
        self.events.emit(MODEL_DELETED, spec.name, model_id=spec.model_id)
        await self.catalogue.refresh()
        return json_response({"name": spec.name, "model_id": spec.model_id, "deleted": True})

    async def instances(self, request: web.Request) -> web.StreamResponse:
        """{instances: […]}, newest first: what the workers say, and from the database those they list no more."""
        names = {spec.model_id: spec.name for spec in self.catalogue.all()}
        rows = {row.instance_id: row for row in await self.database.instances.recent(INSTANCES_MAX)}
        live = {
            status.instance_id: {"node": worker.node, **_instance(status)}
            for worker in self.live.nodes.all()
            for status in worker.instances
        }
        known = {i: _row(row, names.get(row.model_id, "")) for i, row in rows.items()}
        merged = {i: {**known.get(i, {}), **live.get(i, {})} for i in [*(i for i in live if i not in rows), *rows]}
        return json_response({"instances": list(merged.values())})

    async def nodes(self, request: web.Request) -> web.StreamResponse:
        """{nodes: […]} ordered by name. live: its worker was heard within the silence limit."""
        workers = {worker.node: worker for worker in self.live.nodes.all()}
        stores = {store.node: store for store in self.stores.all()}
        registered = {row.name: row for row in await self.database.nodes.all()}
        nodes = []
        for name in sorted({*workers, *stores, *registered}):
            worker, store, row = workers.get(name), stores.get(name), registered.get(name)
            source = worker or row
            nodes.append(
                {
                    "node": name,
                    "live": worker is not None,
                    "boot_id": source.boot_id if source else "",
                    "devices": msgspec.to_builtins(source.devices if source else ()),
                    "zygote_ready": worker is not None and worker.zygote_ready,
                    "draining": worker is not None and worker.draining,
                    "prepared": worker.prepared if worker else (),
                    "store_live": store is not None,
                    "address": store.address if store else "",
                    "tiers": [_full(tier) for tier in store.tiers] if store else [],
                    "links": [_full(link) for link in store.links] if store else [],
                }
            )
        return json_response({"nodes": nodes})

    async def _want(self, request: web.Request, want: WantPrefetch) -> web.StreamResponse:
        for node in want.nodes:
            check_node(node, "node" if want.cancel else "nodes")
        reply: CommandReply = await ask(
            self.bus, subjects.SCHEDULER_PREFETCH, want, CommandReply, timeout_s=PREFETCH_TIMEOUT_S
        )
        if isinstance(reply, Failed):
            return refused(reply)
        return json_response({"model": request.match_info["name"], **_full(want)}, 202)

    def _held(self) -> dict[str, list[dict[str, Any]]]:
        """What live storage agents hold, by model id."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for store in self.stores.all():
            for held in store.held:
                found[held.model_id].append(_lies(store.node, held.tier, held.held_bytes, held.total_bytes))
        return found

    def _model(
        self, spec: ModelSpec, held: Sequence[dict[str, Any]], placements: Sequence[Placement]
    ) -> dict[str, Any]:
        instances = [
            {"instance_id": i.instance_id, "node": worker.node, "state": i.state, "room": i.room, "running": i.running}
            for worker in self.live.nodes.all()
            for i in worker.instances
            if i.model_id == spec.model_id
        ]
        silent = [
            _lies(p.node, p.tier, p.held_bytes, max(spec.weight_bytes, p.held_bytes))
            for p in placements
            if self.stores.get(p.node) is None
        ]
        tiers = sorted([*held, *silent], key=lambda lies: (lies["node"], lies["tier"]))
        return {**_full(spec), "instances": instances, "tiers": tiers}


def _lies(node: str, tier: Tier, held_bytes: int, total_bytes: int) -> dict[str, Any]:
    return {"node": node, "tier": tier, "held_bytes": held_bytes, "total_bytes": total_bytes}


def _full(message: msgspec.Struct) -> dict[str, Any]:
    """All fields, also those at their defaults, which a contract's own encoding leaves out."""
    return {field: msgspec.to_builtins(getattr(message, field)) for field in message.__struct_fields__}


def _instance(status: InstanceStatus) -> dict[str, Any]:
    return {**_full(status), "phases": _full(status.phases)}


def _row(row: InstanceRow, model: str) -> dict[str, Any]:
    return {
        "instance_id": row.instance_id,
        "model_id": row.model_id,
        "model": model or row.model_id,
        "node": row.node,
        "state": row.actual,
        "desired": row.desired,
        "devices": row.devices,
        "reason": row.reason,
        "phases": _full(row.phases),
        "created_at": row.created_at,
    }


def refused(reply: Failed) -> web.Response:
    """What another service refused, as an error of ours."""
    status = status_of(reply.code)
    response = json_response(error_body(status, reply.code, reply.message), status)
    if reply.retryable:
        response.headers["Retry-After"] = "1"
    return response


def check_node(node: str, param: str) -> None:
    if not _NODE_NAME.fullmatch(node):
        raise InvalidRequest(f"{param}: {node!r} is no node name", param)


def _tier(fields: Fields) -> Tier:
    given = fields.string("tier") or Tier.DRAM.value
    if given not in (Tier.SSD, Tier.DRAM):
        raise fields.refuse("tier", "must be ssd or dram")
    return Tier(given)


def _options(fields: Fields) -> ModelOptions:
    """Raises InvalidRequest naming the option."""
    raw = fields.take("options") or {}
    if not isinstance(raw, dict):
        raise fields.refuse("options", "must be an object")
    unknown = sorted(set(raw) - set(ModelOptions.__struct_fields__))
    if unknown:
        raise InvalidRequest(f"options.{unknown[0]}: is not an option", f"options.{unknown[0]}")
    try:
        return msgspec.convert(raw, ModelOptions)
    except msgspec.ValidationError as error:
        field = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else ""
        param = f"options.{field}" if field else "options"
        raise InvalidRequest(f"{param}: {str(error).split(' - at')[0]}", param) from error
