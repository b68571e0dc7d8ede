"""Models of a simulated world: small files in real geometry, each shard one chunk, some of them in several models."""

from __future__ import annotations

from dataclasses import dataclass

from stoker_checkpoint.digests import chunk_digest
from stoker_checkpoint.header import Shard, TensorRef
from stoker_checkpoint.leased import encode_manifest
from stoker_checkpoint.manifest import Manifest
from stoker_contracts.models import ModelSpec
from stoker_db.ports import ModelFile
from stoker_sim.dice import Dice

HEADER_BYTES = 16
SHARD_BYTES_MIN, SHARD_BYTES_MAX = 600, 12_000
SHARED = 0.15
"""How often a shard is also another model's."""


@dataclass(frozen=True)
class Contents:
    """A model as its source has it. shards: by position.  bound: its digests are known from the start."""

    spec: ModelSpec
    shards: tuple[bytes, ...]
    bound: bool

    @property
    def model_id(self) -> str:
        return self.spec.model_id

    @property
    def names(self) -> list[str]:
        return [f"{index:02}.safetensors" for index in range(len(self.shards))]

    def manifest(self) -> bytes:
        shards = tuple(_shard(name, data) for name, data in zip(self.names, self.shards, strict=True))
        return encode_manifest(Manifest(shards=shards))

    def files(self) -> list[ModelFile]:
        """As the catalogue has them."""
        config = b'{"model": "' + self.model_id.encode() + b'"}'
        small = [ModelFile(path="config.json", size_bytes=len(config), digest="sha256:0", content=config)]
        return small + [
            ModelFile(path=name, size_bytes=len(data), chunk_digests=(chunk_digest(data),) if self.bound else ())
            for name, data in zip(self.names, self.shards, strict=True)
        ]


class Library:
    """All models that were ever made, by id and by source."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._shards: list[bytes] = []
        self.by_id: dict[str, Contents] = {}
        self.by_source: dict[str, Contents] = {}

    def make(self, shards_max: int) -> Contents:
        dice, number = self._dice, len(self.by_id)
        made: list[bytes] = []
        for _ in range(dice.between(1, shards_max)):
            if self._shards and dice.chance(SHARED):
                made.append(dice.choice(self._shards))
            else:
                made.append(dice.bytes(dice.between(SHARD_BYTES_MIN, SHARD_BYTES_MAX)))
        self._shards += made
        spec = ModelSpec(
            model_id=f"m{number}",
            name=f"model-{number}",
            source=f"sim://{number}",
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            weight_bytes=sum(map(len, made)),
            max_model_len=1,
            vocab_size=1,
            kv_bytes_per_token=1,
            kv_cache_bytes=1,
            slots=1,
        )
        contents = Contents(spec, tuple(made), bound=dice.chance(0.5))
        self.by_id[spec.model_id] = self.by_source[spec.source] = contents
        return contents


def _shard(name: str, data: bytes) -> Shard:
    size = len(data) - HEADER_BYTES
    tensor = TensorRef(name=name, dtype="U8", shape=(size,), shard=name, offset_bytes=HEADER_BYTES, size_bytes=size)
    return Shard(name=name, size_bytes=len(data), data_offset_bytes=HEADER_BYTES, tensors=(tensor,), metadata={})
