"""The admin API: why models were placed as they were, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from stoker_contracts.codec import spelled_out
from stoker_contracts.decisions import DecisionRecord
from stoker_core.errors import InstanceNotFound, InvalidRequest
from stoker_db.ports import Decisions
from stoker_gateway.catalogue import Catalogue
from stoker_gateway.web.middleware import json_response

LIMIT = 20
LIMIT_MAX = 200


@dataclass(frozen=True)
class DecisionRoutes:
    decisions: Decisions
    catalogue: Catalogue

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/admin/v1/models/{name}/decisions", self.of_model),
            web.get("/admin/v1/instances/{instance_id}/decisions", self.of_instance),
        ]

    async def of_model(self, request: web.Request) -> web.StreamResponse:
        """?limit=… → {decisions: […]}, newest first.

        Each as it was made, and: model, the name; error and load_error, |predicted − actual| ÷ actual of the start and of its
        load, null where nothing can be compared.
        """
        limit = _limit(request.query.get("limit"))
        model_id = self.catalogue.get(request.match_info["name"]).model_id
        return self._answer(await self.decisions.of_model(model_id, limit))

    async def of_instance(self, request: web.Request) -> web.StreamResponse:
        """{decisions: [the one that started it]}. 404 if none is known."""
        instance_id = request.match_info["instance_id"]
        record = await self.decisions.of_instance(instance_id)
        if record is None:
            raise InstanceNotFound(instance_id)
        return self._answer([record])

    def _answer(self, records: Sequence[DecisionRecord]) -> web.Response:
        names = {spec.model_id: spec.name for spec in self.catalogue.all()}
        found = [
            {
                **spelled_out(record),
                "model": names.get(record.model_id, record.model_id),
                "error": record.error,
                "load_error": record.load_error,
            }
            for record in records
        ]
        return json_response({"decisions": found})


def _limit(given: str | None) -> int:
    if given is None:
        return LIMIT
    if not given.isdecimal() or len(given) > 9 or not 1 <= int(given) <= LIMIT_MAX:
        raise InvalidRequest(f"limit: must be a number from 1 to {LIMIT_MAX}", "limit")
    return int(given)
