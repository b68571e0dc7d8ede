"""A checkpoint as the storage agent knows it, on the disk and in memory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec

from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan, plan_reads

PLANS_KEPT = 64


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One registered model's weights: where they come from, and how they are cut into chunks.

    A position is one chunk of one shard, in the order of the files. The manifest's shards have the digests of their chunks
    once these are bound: all of them, or none.
    versions: shard → its version at the source; empty where the source has none.  small_bytes: of the folder's other files.
    """

    model_id: str
    name: str
    source: str
    manifest: Manifest
    versions: dict[str, str] = {}
    small_bytes: int = 0

    @property
    def plan(self) -> ReadPlan:
        """Of whole files."""
        return _plan(self.manifest)

    @property
    def positions(self) -> int:
        return sum(-(-shard.size_bytes // CHUNK_BYTES) for shard in self.manifest.shards)

    @property
    def weight_bytes(self) -> int:
        """Of all shards, headers included: what the tiers hold of a model."""
        return self.manifest.file_bytes

    @property
    def bound(self) -> bool:
        return all(shard.digests for shard in self.manifest.shards)

    def place(self, position: int) -> tuple[str, int, int]:
        """(shard, offset in it, bytes) of a position."""
        index, chunk = self.plan.positions[position]
        shard = self.manifest.shards[index]
        offset = chunk * CHUNK_BYTES
        return shard.name, offset, min(CHUNK_BYTES, shard.size_bytes - offset)

    def digest(self, position: int) -> str:
        """Empty until it is bound."""
        index, chunk = self.plan.positions[position]
        digests = self.manifest.shards[index].digests
        return digests[chunk] if digests else ""

    def with_digests(self, digests: Mapping[str, Sequence[str]]) -> Checkpoint:
        """Bound. digests: shard → of each of its chunks."""
        shards = tuple(
            msgspec.structs.replace(shard, digests=tuple(digests[shard.name])) for shard in self.manifest.shards
        )
        return msgspec.structs.replace(self, manifest=msgspec.structs.replace(self.manifest, shards=shards))

    def by_shard(self, digests: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Digests by position, as `with_digests` and the catalogue take them."""
        found: dict[str, list[str]] = {shard.name: [] for shard in self.manifest.shards}
        for (index, _), digest in zip(self.plan.positions, digests, strict=True):
            found[self.manifest.shards[index].name].append(digest)
        return {name: tuple(of) for name, of in found.items()}


@lru_cache(maxsize=PLANS_KEPT)
def _plan_of(manifest: _ById) -> ReadPlan:
    return plan_reads(manifest.manifest)


class _ById:
    """A manifest as a key: hashing one with ten thousand tensors costs more than planning it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __hash__(self) -> int:
        return id(self.manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.manifest is self.manifest


def _plan(manifest: Manifest) -> ReadPlan:
    return _plan_of(_ById(manifest))
