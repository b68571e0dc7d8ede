"""The registered models, read from Postgres every second and served from memory."""

from __future__ import annotations

import asyncio

from stoker_contracts.models import ModelSpec
from stoker_core.errors import DatabaseUnavailable, ModelNotFound
from stoker_core.logging import get_logger
from stoker_db.ports import Models
from stoker_gateway.queues import Dispatcher
from stoker_gateway.texts import TokenizerCache

log = get_logger("catalogue")


class Catalogue:
    """While Postgres is away, what was read last is served."""

    def __init__(self, models: Models, texts: TokenizerCache, dispatcher: Dispatcher) -> None:
        self._models = models
        self._texts = texts
        self._dispatcher = dispatcher
        self._by_name: dict[str, ModelSpec] = {}
        self._fresh: list[ModelSpec] = []
        self._news = asyncio.Event()
        self.was_read = False

    async def refresh(self) -> None:
        """Raises DatabaseUnavailable."""
        before = {spec.model_id: spec for spec in self._by_name.values()}
        specs = await self._models.all()
        self._by_name = {spec.name: spec for spec in specs}
        self.was_read = True
        now = {spec.model_id for spec in specs}
        for spec in [s for i, s in before.items() if i not in now]:
            self._texts.drop(spec.model_id)
            self._dispatcher.queues.refuse_all(spec.model_id, ModelNotFound(spec.name))
            log.info("model_gone", model=spec.name)
        if fresh := [spec for spec in specs if spec.model_id not in before]:
            self._fresh += fresh
            self._news.set()

    async def preload(self) -> None:
        """Build the tokenizers of models as they appear, so that a cold start need not wait for them. For ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            fresh, self._fresh = self._fresh, []
            await self._texts.preload(fresh)

    def get(self, name: str) -> ModelSpec:
        """Raises ModelNotFound; DatabaseUnavailable before the first reading."""
        if not self.was_read:
            raise DatabaseUnavailable("the models have not been read yet")
        spec = self._by_name.get(name)
        if spec is None:
            raise ModelNotFound(name)
        return spec

    def all(self) -> list[ModelSpec]:
        """Ordered by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]
