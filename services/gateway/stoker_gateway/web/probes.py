"""/healthz, /readyz, /metrics."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from stoker_bus.port import Bus
from stoker_gateway.accuracy import Accuracies
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.intake import Intake
from stoker_gateway.metrics import Metrics
from stoker_gateway.queues import Queues
from stoker_gateway.web.middleware import json_response


@dataclass(frozen=True)
class ProbeRoutes:
    bus: Bus
    catalogue: Catalogue
    intake: Intake
    queues: Queues
    metrics_state: Metrics
    accuracies: Accuracies

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/healthz", self.healthz),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
        ]

    async def healthz(self, request: web.Request) -> web.StreamResponse:
        return json_response({"status": "alive"})

    async def readyz(self, request: web.Request) -> web.StreamResponse:
        reasons = []
        if not self.bus.connected:
            reasons.append("the message bus is not connected")
        if not self.catalogue.was_read:
            reasons.append("the models have not been read yet")
        if self.intake.stopping:
            reasons.append("stopping")
        status = "not ready" if reasons else "ready"
        return json_response({"status": status, "reasons": reasons}, 503 if reasons else 200)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        queued = {spec.name: self.queues.depth(spec.model_id) for spec in self.catalogue.all()}
        accuracy = await self.accuracies.read()
        body = self.metrics_state.render(queued=queued, open_streams=self.intake.open, accuracy=accuracy)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
