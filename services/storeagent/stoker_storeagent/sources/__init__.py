"""Where models may come from: directories of this node and S3, each behind `ports.Source`."""

from __future__ import annotations

from collections.abc import Mapping

from stoker_core.errors import RefusedCheckpoint
from stoker_storeagent.ports import Inspected, OnBytes, Source
from stoker_storeagent.sources.urls import FORMS, scheme_of, shown_source


class Sources:
    """Picks the source by the scheme of a URL. by_scheme: as URLs name it; an absolute path counts as `file`."""

    def __init__(self, by_scheme: Mapping[str, Source]) -> None:
        self._by_scheme = dict(by_scheme)

    def of(self, url: str) -> Source:
        """Raises RefusedCheckpoint naming the schemes that work."""
        source = self._by_scheme.get(scheme_of(url))
        if source is None:
            works = " or ".join(FORMS[scheme] for scheme in self._by_scheme)
            raise RefusedCheckpoint(shown_source(url), f"the source must be {works}")
        return source

    def kind(self, url: str) -> str:
        """As events and observations name it. Raises RefusedCheckpoint as `of` does."""
        return self.of(url).kind

    async def inspect(self, url: str) -> Inspected:
        """Raises RefusedCheckpoint, CorruptCheckpoint, SourceUnavailable, SourceDenied."""
        return await self.of(url).inspect(url)

    async def read(self, url: str, shard: str, version: str, offset: int, into: memoryview, on_bytes: OnBytes) -> None:
        """As `ports.Source.read`."""
        await self.of(url).read(url, shard, version, offset, into, on_bytes)
