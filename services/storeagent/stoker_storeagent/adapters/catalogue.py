"""The catalogue of models on the database."""

from __future__ import annotations

from collections.abc import Sequence

from stoker_contracts.models import ModelSpec
from stoker_core.errors import ModelNotFound
from stoker_db.ports import Database, ModelFile


class DatabaseCatalogue:
    """Implements ports.Catalogue."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, model_id: str) -> tuple[ModelSpec, Sequence[ModelFile]]:
        for spec in await self._database.models.all():
            if spec.model_id == model_id:
                return spec, await self._database.models.files(model_id, with_content=False)
        raise ModelNotFound(model_id)

    async def bind(self, model_id: str, digests: dict[str, str]) -> None:
        await self._database.models.bind_digests(model_id, digests)
