"""The admin API: empty a node, or use it again."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from stoker_bus.port import Bus, ask
from stoker_contracts import subjects
from stoker_contracts.control import CommandReply, Failed, WantDrain
from stoker_contracts.models import LIVE_STATES
from stoker_db.ports import Database
from stoker_gateway.routes import Routes
from stoker_gateway.web.admin import check_node, refused
from stoker_gateway.web.middleware import json_response

DRAIN_TIMEOUT_S = 15.0  # the leader writes it to the database first


@dataclass(frozen=True)
class DrainRoutes:
    bus: Bus
    database: Database
    live: Routes

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/admin/v1/nodes/{node}/drain", self.drain),
            web.delete("/admin/v1/nodes/{node}/drain", self.undo),
            web.get("/admin/v1/nodes/{node}/drain", self.progress),
        ]

    async def drain(self, request: web.Request) -> web.StreamResponse:
        """202, as `progress`: it is stored, and what runs there ends once it is idle."""
        return await self._want(WantDrain(node=_node(request)))

    async def undo(self, request: web.Request) -> web.StreamResponse:
        """202, as `progress`: the node may be used again."""
        return await self._want(WantDrain(node=_node(request), undo=True))

    async def progress(self, request: web.Request) -> web.StreamResponse:
        """{node, draining, drained, live, instances: [{instance_id, model, state, running}]}.

        draining: it is to be empty.  drained: nothing is left there.  live: its worker was heard within the silence limit;
        instances: those it says it has.
        """
        return await self._progress(_node(request), 200)

    async def _want(self, want: WantDrain) -> web.StreamResponse:
        reply: CommandReply = await ask(
            self.bus, subjects.SCHEDULER_DRAIN, want, CommandReply, timeout_s=DRAIN_TIMEOUT_S
        )
        if isinstance(reply, Failed):
            return refused(reply)
        return await self._progress(want.node, 202)

    async def _progress(self, node: str, status: int) -> web.Response:
        row = next((row for row in await self.database.nodes.drains() if row.node == node), None)
        worker = self.live.nodes.get(node)
        instances = [
            {"instance_id": i.instance_id, "model": i.model, "state": i.state, "running": i.running}
            for i in (worker.instances if worker else ())
            if i.state in LIVE_STATES
        ]
        answer = {
            "node": node,
            "draining": row is not None,
            "drained": row is not None and row.drained,
            "live": worker is not None,
            "instances": instances,
        }
        return json_response(answer, status)


def _node(request: web.Request) -> str:
    node = request.match_info["node"]
    check_node(node, "node")
    return node
