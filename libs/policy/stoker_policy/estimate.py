"""What was learned of nodes, links, tiers, engines and outputs; and from it, how long a start would take."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable

from stoker_contracts.models import EngineKind, ModelSpec, Tier
from stoker_policy.learn import KEYS_MAX, Absurd, Belief, Guess, Windows, belief, blend, require
from stoker_policy.lengths import Lengths
from stoker_policy.line import Line, Lines, at
from stoker_policy.priors import BYTES_MAX, BYTES_PER_S_MAX, SECONDS_MAX, TOKENS_MAX, Priors
from stoker_policy.startup import EngineState, Stage, StartFacts, StartSeen, Startup, pipeline

__all__ = [
    "Absurd",
    "EngineState",
    "Estimates",
    "Guess",
    "Priors",
    "Stage",
    "StartFacts",
    "StartSeen",
    "Startup",
]

AGENT_SAMPLES = 2.0
"""What a storage agent's own average is worth, in observed starts: it is of many transfers, but of one stage alone."""
AGENT_SPREAD = 0.3
OVERHEAD_SHARE_MAX = 0.75
"""No more of a load than this is taken for its fixed cost."""
SECONDS_MIN = 1e-4
"""Shorter durations are taken for this: clocks and schedulers say no more."""
_SOURCES = (Tier.REMOTE, Tier.PEER, Tier.SSD, Tier.DRAM)
_STARTS, _TIERS, _LINKS = range(3)  # what a bandwidth is learned from
_ALL = ""  # in a key: whatever the node, origin, model

Key = Hashable


class Estimates:
    """Learns online. Deterministic: the same observations in the same order give the same answers; asking changes nothing.

    Every quantity is kept per exact key and per coarser ones, and a key of which little was seen leans on the next coarser
    (`learn.blend`). Bounded: KEYS_MAX keys a table, those observed longest ago go first.
    Every observe_… raises Absurd for what cannot be true, and then has changed nothing.
    """

    def __init__(self, priors: Priors | None = None, *, keys_max: int = KEYS_MAX) -> None:
        self._priors = priors or Priors()
        self._keys_max = keys_max
        self._rates = Windows(keys_max)
        self._engines = Windows(keys_max)
        self._overheads = Lines(keys_max)
        self._migrations = Lines(keys_max)
        self._tiers: OrderedDict[Key, Belief] = OrderedDict()
        self._links: OrderedDict[Key, Belief] = OrderedDict()
        self._evidence = (self._rates, self._tiers, self._links)
        self._bandwidths: dict[Key, Belief] = {}  # answers already worked out, until something new is observed
        self._overheads_s: dict[Key, float] = {}
        self._outputs: OrderedDict[str, Lengths] = OrderedDict()
        given = self._priors
        self._rate_priors = {
            tier: belief(value, given.bandwidth_spread)
            for tier, value in zip(
                _SOURCES,
                (given.remote_bytes_per_s, given.peer_bytes_per_s, given.ssd_bytes_per_s, given.dram_bytes_per_s),
                strict=True,
            )
        }

    def __len__(self) -> int:
        """Keys that something is remembered of."""
        learned = len(self._rates) + len(self._engines) + len(self._overheads) + len(self._migrations)
        return learned + len(self._tiers) + len(self._links) + len(self._outputs)

    # Observing

    def observe_start(self, seen: StartSeen) -> None:
        """A start from tier T was seen end to end, so what it says of T is of the whole way from there into the engine.

        One that shared the way with others looks slower than it is; medians bear some of those. With no durations at all it
        says nothing: they were not measured.
        """
        require("weight_bytes", seen.weight_bytes, BYTES_MAX)
        require("source_bytes", seen.source_bytes, seen.weight_bytes, zero=True)
        require("load_s", seen.load_s, SECONDS_MAX, zero=True)
        require("engine_s", seen.engine_s, SECONDS_MAX, zero=True)
        require("ranks", seen.ranks, 1024)
        if not seen.load_s and not seen.engine_s:
            return
        load_s = max(seen.load_s, SECONDS_MIN)
        came_bytes = seen.source_bytes or seen.weight_bytes
        share_bytes = seen.weight_bytes / seen.ranks  # of each rank, all at the same time
        dram, kind = seen.source is Tier.DRAM, seen.engine_kind.value
        size_bytes = share_bytes if dram else came_bytes
        origin = kind if dram else "" if seen.source is Tier.SSD else seen.origin
        moving_s = load_s - min(self._overhead_s(seen.node, seen.engine_kind), load_s * OVERHEAD_SHARE_MAX)
        require("bandwidth", size_bytes / moving_s, BYTES_PER_S_MAX)
        require("bandwidth", seen.weight_bytes / load_s, BYTES_PER_S_MAX)
        start = (kind, seen.engine.value, seen.ranks)
        levels = _engine_levels(seen.node, start, seen.model_id, seen.architecture)
        self._engines.observe(levels, max(seen.engine_s, SECONDS_MIN))
        if seen.source not in _SOURCES or 2 * came_bytes < seen.weight_bytes:
            return  # from where is not known, or little came from there: something else may have taken the time
        keys = [key for table, key in _rate_levels(seen.node, seen.source, origin) if table == _STARTS]
        self._rates.observe(keys, size_bytes / moving_s)
        self._bandwidths.clear()
        self._rates.observe([(seen.node, seen.source, origin, seen.model_id)], size_bytes / load_s)
        if dram:
            self._overheads.observe([(seen.node, seen.engine_kind)], size_bytes, load_s)
            self._overheads_s.clear()
            return
        # What came from farther at this rate went through the last stage at this rate, or faster.
        engine = self.bandwidth(seen.node, Tier.DRAM, kind)
        if not engine.samples and share_bytes / load_s > engine.value:
            self._rates.observe([(_ALL, Tier.DRAM, kind)], share_bytes / load_s)
            self._bandwidths.clear()

    def observe_tier(self, node: str, tier: Tier, bytes_per_s: float) -> None:
        """A storage agent's own average, which takes the place of the one before. 0: it knows none."""
        self._observe_average(self._tiers, (node, tier, _ALL), bytes_per_s)

    def observe_link(self, node: str, peer: str, bytes_per_s: float) -> None:
        """The same, of what `node` gets from `peer`."""
        self._observe_average(self._links, (node, Tier.PEER, peer), bytes_per_s)

    def observe_migration(self, node: str, tokens: int, seconds: float) -> None:
        """A request of so many tokens, prompt and output, moved to `node`."""
        require("tokens", tokens, TOKENS_MAX, zero=True)
        require("seconds", seconds, SECONDS_MAX, zero=True)
        self._migrations.observe([node, _ALL], tokens, max(seconds, SECONDS_MIN))

    def observe_output(self, model_id: str, tokens: int) -> None:
        """A request finished with so many tokens of output."""
        require("tokens", tokens, TOKENS_MAX, zero=True)
        for key in (model_id, _ALL):
            lengths = self._outputs.setdefault(key, Lengths())
            self._outputs.move_to_end(key)
            lengths.add(tokens)
        while len(self._outputs) > self._keys_max:
            self._outputs.popitem(last=False)

    # Asking

    def bandwidth(self, node: str, source: Tier, origin: str = "") -> Guess:
        """Bytes/s from there into an engine on `node`, for a long load.

        origin: a peer's node, or the kind of a remote source, or of dram the kind of engine; '' there: vllm.
        """
        return self._bandwidth(node, source, origin).guess

    def engine_start(self, node: str, model: ModelSpec, state: EngineState) -> Guess:
        """Seconds of an engine's start beside its load."""
        return self._engine(node, model, state, model.tensor_parallel).guess

    def migration(self, node: str, tokens: int) -> Guess:
        """Seconds until a request of so many tokens, prompt and output, goes on at `node`."""
        given = self._priors
        slope, constant = given.migration_s_per_token, given.migration_s
        known = Belief(math.log(slope * tokens + constant), given.migration_spread)
        for key in (_ALL, node):
            line = self._migrations.get(key)
            if line is not None:
                slope, constant = line.fit(slope, constant)
            known = blend(known, _on_line(line, slope, constant, tokens))
        return known.guess

    def remaining_tokens(self, model_id: str, generated: int) -> Guess:
        """Output tokens yet to come of a request that has `generated` of them."""
        known = belief(self._priors.output_tokens, self._priors.output_spread)
        for key in (_ALL, model_id):
            lengths = self._outputs.get(key)
            known = blend(known, None if lengths is None else lengths.left(generated))
        return known.guess

    def startup(self, facts: StartFacts) -> Startup:
        """How long a start would take: `startup.pipeline` with what was learned."""
        model, node, (tier, origin) = facts.model, facts.node, facts.rest
        return pipeline(
            facts,
            rest=self._load_rate(node, tier, origin, model),
            ssd=self._load_rate(node, Tier.SSD, "", model),
            dram=self._load_rate(node, Tier.DRAM, model.engine.value, model, facts.ranks),
            engine=self._engine(node, model, facts.engine, facts.ranks).guess,
        )

    # Inside

    def _observe_average(self, averages: OrderedDict[Key, Belief], key: Key, bytes_per_s: float) -> None:
        require("read_bytes_per_s", bytes_per_s, BYTES_PER_S_MAX, zero=True)
        if not bytes_per_s:
            return
        average = belief(bytes_per_s, AGENT_SPREAD, weight=AGENT_SAMPLES)
        if averages.get(key) != average:  # agents repeat themselves every second
            averages[key] = average
            self._bandwidths.clear()
        averages.move_to_end(key)
        while len(averages) > self._keys_max:
            averages.popitem(last=False)

    def _bandwidth(self, node: str, source: Tier, origin: str) -> Belief:
        """From the coarsest to the finest.

        What starts on other nodes gave says least: nodes differ. The agent's own average is of this node, but of one stage
        alone, and transfers at the same time share it; so starts that were seen here go before it. Of peers a link goes before
        other links of the same node. Kinds of engines do not stand in for one another: between one that copies weights and
        one that only reads them lies a factor of ten.
        """
        asked = (node, source, origin)
        known = self._bandwidths.get(asked)
        if known is None:
            known = self._rate_priors.get(source, self._rate_priors[Tier.REMOTE])
            for table, key in _rate_levels(*asked):
                known = blend(known, self._evidence[table].get(key))
            if len(self._bandwidths) >= self._keys_max:
                self._bandwidths.clear()
            self._bandwidths[asked] = known
        return known

    def _load_rate(self, node: str, source: Tier, origin: str, model: ModelSpec, ranks: int = 1) -> Guess:
        """Bytes/s of a whole load of this model, its fixed cost in it; what loads of this very model gave goes before all."""
        known = self._bandwidth(node, source, origin)
        size_bytes = model.weight_bytes / max(ranks, 1)
        seconds = self._overhead_s(node, model.engine) + size_bytes / math.exp(known.location)
        rate = Belief(math.log(size_bytes / seconds), known.deviation)
        return blend(rate, self._rates.get((node, source, origin, model.model_id))).guess

    def _overhead_s(self, node: str, kind: EngineKind) -> float:
        """The fixed cost of a load: what loads from memory, the shortest there are, would cost with no bytes at all.

        As assumed until loads of several sizes were seen there; never more than OVERHEAD_SHARE_MAX of the shortest.
        """
        known_s = self._overheads_s.get((node, kind))
        if known_s is None:
            line, known_s = self._overheads.get((node, kind)), self._priors.overhead_s
            if line is not None:
                known_s = min(
                    line.fit(0.0, known_s)[1] if line.determined else known_s, line.lowest * OVERHEAD_SHARE_MAX
                )
            if len(self._overheads_s) >= self._keys_max:
                self._overheads_s.clear()
            self._overheads_s[(node, kind)] = known_s
        return known_s

    def _engine(self, node: str, model: ModelSpec, state: EngineState, ranks: int) -> Belief:
        kind = "sim" if model.engine is EngineKind.SIM else "vllm"
        prior = belief(getattr(self._priors, f"{kind}_{state.value}_s"), self._priors.engine_spread)
        start = (model.engine.value, state.value, ranks)
        return self._engines.fold(prior, _engine_levels(node, start, model.model_id, model.architecture))


def _rate_levels(node: str, source: Tier, origin: str) -> list[tuple[int, Key]]:
    """Where to look for a bandwidth, from the coarsest to the finest: a table of evidence and a key in it."""
    anywhere, tier = (_STARTS, (_ALL, source, _ALL)), (_TIERS, (node, source, _ALL))
    match source:
        case Tier.DRAM:
            origin = origin or EngineKind.VLLM.value
            levels = [tier, (_STARTS, (_ALL, source, origin)), (_STARTS, (node, source, origin))]
        case Tier.PEER:
            here, link = (node, source, _ALL), (node, source, origin)
            levels = [anywhere, tier, (_STARTS, here), (_LINKS, link), (_STARTS, link)]
        case _:
            levels = [anywhere, (_STARTS, (_ALL, source, origin)), tier, (_STARTS, (node, source, origin))]
    return list(dict.fromkeys(levels))


def _engine_levels(node: str, start: tuple[str, str, int], model_id: str, architecture: str) -> list[Key]:
    """From the coarsest to the finest. start: engine kind, state, ranks.

    The model on other nodes goes before the node's other models: its KV cache alone may take longer than all the rest.
    """
    return [start, (*start, architecture, node), (*start, _ALL, _ALL, model_id), (*start, _ALL, node, model_id)]


def _on_line(line: Line | None, slope: float, constant: float, x: float) -> Belief | None:
    if line is None:
        return None
    return Belief(math.log(at(x, slope, constant)), line.deviation(slope, constant), float(line.samples), line.samples)
