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
from stoker_contracts.control import Failed, InstanceStatus, RegisterModel, RegisterReply, StoreStatus
from stoker_contracts.events import MODEL_DELETED
from stoker_contracts.models import ModelOptions, ModelSpec
from stoker_core.errors import InvalidRequest, NoNode
from stoker_db.ports import Database, InstanceRow, Placement
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.newest import Newest
from stoker_gateway.openai.errors import error_body, status_of
from stoker_gateway.openai.fields import Fields, decode_object
from stoker_gateway.routes import Routes
from stoker_gateway.web.middleware import json_response

_NODE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
INSTANCES_MAX = 100  # ended ones included


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
        node = fields.string("node") or next((store.node for store in self.stores.all()), None)
        fields.refuse_rest()
        if node is None:
            raise NoNode("no storage agent is live; start a node first")
        if not _NODE_NAME.fullmatch(node):
            raise InvalidRequest(f"node: {node!r} is no node name", "node")
        reply: RegisterReply = await ask(
            self.bus, subjects.store_register(node), message, RegisterReply, timeout_s=self.register_timeout_s
        )
        if isinstance(reply, Failed):
            status = status_of(reply.code)
            return json_response(error_body(status, reply.code, reply.message), status)
        await self.catalogue.refresh()
        answer = {
            "model": self._model(reply.model, await self.database.tiers.placements(reply.model.model_id)),
            "created": reply.created,
            "files": reply.files,
            "total_bytes": reply.total_bytes,
        }
        return json_response(answer, 201 if reply.created else 200)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """{models: [specification, instances: […], tiers: [{node, tier, held_bytes, total_bytes}]]}."""
        held: dict[str, list[Placement]] = defaultdict(list)
        for placement in await self.database.tiers.placements():
            held[placement.model_id].append(placement)
        specs = await self.database.models.all()
        return json_response({"models": [self._model(spec, held[spec.model_id]) for spec in specs]})

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
                    "tiers": [_full(tier) for tier in store.tiers] if store else [],
                }
            )
        return json_response({"nodes": nodes})

    def _model(self, spec: ModelSpec, placements: Sequence[Placement]) -> dict[str, Any]:
        instances = [
            {"instance_id": i.instance_id, "node": worker.node, "state": i.state, "room": i.room, "running": i.running}
            for worker in self.live.nodes.all()
            for i in worker.instances
            if i.model_id == spec.model_id
        ]
        tiers = [
            {"node": p.node, "tier": p.tier, "held_bytes": p.held_bytes, "total_bytes": self._total_bytes(p, spec)}
            for p in placements
        ]
        return {**_full(spec), "instances": instances, "tiers": tiers}

    def _total_bytes(self, placement: Placement, spec: ModelSpec) -> int:
        """Of all files, as the node's storage agent says; the weights alone while it is silent."""
        store = self.stores.get(placement.node)
        for held in store.held if store else ():
            if held.model_id == placement.model_id and held.tier is placement.tier:
                return held.total_bytes
        return max(spec.weight_bytes, placement.held_bytes)


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
