"""When the first token of a start could come, by part; and what is told of starts that happened."""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from stoker_contracts.models import EngineKind, ModelSpec, Tier
from stoker_policy.learn import Guess


class EngineState(StrEnum):
    """What an engine starts from: nothing, a process with its imports paid, or an instance that sleeps."""

    COLD = "cold"
    ZYGOTE = "zygote"
    ASLEEP = "asleep"


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a pipelined load. name: 'remote', 'peer:n2', 'ssd', or 'engine' (from the pool).

    size_bytes: what has to go through it.  seconds: what it would take alone.
    """

    name: str
    size_bytes: int
    seconds: float


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate. spread: of total_s, as Guess.spread."""

    queue_s: float  # for loads ahead on the same way
    room_s: float  # until the devices are free: the order to start is sent only then
    load_s: float  # lease and load: the slowest of the stages
    engine_s: float  # fork, construction around the load, announcement
    spread: float
    stages: tuple[Stage, ...]  # as bytes go through them

    @property
    def total_s(self) -> float:
        """Loads ahead go on while room is made; then an instance forks, loads and builds its engine, one after another.

        A worker forks first and builds part of an engine before that asks for weights, while the storage agent brings them. That
        head start shows as a shorter load, and so in the bandwidths that are learned of this very model.
        """
        return max(self.queue_s, self.room_s) + self.load_s + self.engine_s


class StartFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One way to start a model, as far as its duration depends on it.

    dram_bytes: of the weights, in the pool there.  ssd_bytes: further ones, on its SSD.  peer: the node that gives the rest; '':
    the model's own source.  queue_bytes: what starts decided before this one still bring through the same slowest way.
    room_spread: of room_s, as Guess.spread.  ranks: the tensor-parallel size.
    """

    node: str
    model: ModelSpec
    engine: EngineState
    dram_bytes: int = 0
    ssd_bytes: int = 0
    peer: str = ""
    queue_bytes: int = 0
    room_s: float = 0.0
    room_spread: float = 0.0
    ranks: int = 1

    @property
    def rest(self) -> tuple[Tier, str]:
        """Tier and origin of what is not on the node, as instances report them."""
        return (Tier.PEER, self.peer) if self.peer else (Tier.REMOTE, self.model.source.partition(":")[0].lower())


class StartSeen(msgspec.Struct, frozen=True, kw_only=True):
    """One start that happened, from the phases that its instance reported.

    source, origin: where the weights came from, the farthest of them; a peer's node, or the kind of a remote source.
    source_bytes: how many came from there; 0: all.  load_s: lease + load.  engine_s: fork + engine + announce.
    """

    node: str
    model_id: str
    architecture: str
    engine_kind: EngineKind
    engine: EngineState
    weight_bytes: int
    source: Tier
    origin: str
    load_s: float
    engine_s: float
    source_bytes: int = 0
    ranks: int = 1


def pipeline(facts: StartFacts, rest: Guess, ssd: Guess, dram: Guess, engine: Guess) -> Startup:
    """The estimate for a start, from the bandwidths (bytes/s) of where its bytes lie, and the duration of its engine's part (s).

    Stages run side by side, chunk by chunk, so the load takes as long as the slowest. Each carries what is missing behind it:
    what comes from elsewhere has to pass what the disk's bytes pass, and everything the copy into the engine. So more bytes
    held never make a load longer, as long as the disk is no slower than what it spares; with a faster peer it is, and says so.
    Tensor-parallel ranks each take their own share out of the pool, at the same time.
    Source: ServerlessLLM, OSDI 2024, 6.1: load = q + n/b with the slowest tier's b.
    """
    whole_bytes = facts.model.weight_bytes
    dram_bytes = min(max(facts.dram_bytes, 0), whole_bytes)
    ssd_bytes = min(max(facts.ssd_bytes, 0), whole_bytes - dram_bytes)
    rest_bytes = whole_bytes - dram_bytes - ssd_bytes
    share_bytes = -(-whole_bytes // max(facts.ranks, 1))
    stages: list[tuple[Stage, Guess]] = []
    slowest = dram.value * max(facts.ranks, 1)  # bytes/s
    if rest_bytes:
        name = f"peer:{facts.peer}" if facts.peer else "remote"
        stages.append((Stage(name=name, size_bytes=rest_bytes, seconds=rest_bytes / rest.value), rest))
        slowest = min(slowest, rest.value)
    if ssd_bytes:
        seconds = ssd_bytes / ssd.value + rest_bytes / max(ssd.value, rest.value)
        stages.append((Stage(name="ssd", size_bytes=ssd_bytes + rest_bytes, seconds=seconds), ssd))
        slowest = min(slowest, ssd.value)
    stages.append((Stage(name="engine", size_bytes=share_bytes, seconds=share_bytes / dram.value), dram))
    last, source = max(stages, key=lambda stage: stage[0].seconds)  # of equals the first
    queue_s = max(facts.queue_bytes, 0) / slowest
    before_s, before_spread = max((queue_s, source.spread), (facts.room_s, facts.room_spread))
    parts = ((before_s, before_spread), (last.seconds, source.spread), (engine.value, engine.spread))
    total_s = sum(seconds for seconds, _ in parts)
    # Independent parts: their variances add up, each to first order (seconds × spread)².
    deviation_s = math.hypot(*(seconds * spread for seconds, spread in parts))
    return Startup(
        queue_s=queue_s,
        room_s=facts.room_s,
        load_s=last.seconds,
        engine_s=engine.value,
        spread=deviation_s / total_s,
        stages=tuple(stage for stage, _ in stages),
    )
