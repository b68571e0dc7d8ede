"""A cluster that nobody owns, for `stoker bench place`: nodes with eight GPUs, thousands of models, most devices in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from stoker_contracts.models import Device, DeviceKind, EngineKind, InstanceState, ModelSpec, Tier
from stoker_policy import (
    Cluster,
    Decision,
    DemandView,
    EngineState,
    InstanceView,
    NodeView,
    Start,
    StartSeen,
    decide,
)
from stoker_sim.dice import Dice

GB = 10**9
GPU_BYTES = 80 * GB
SIZES = ((14 * GB, 1, 8), (26 * GB, 1, 4), (60 * GB, 2, 2), (140 * GB, 4, 1), (140 * GB, 8, 1))
"""Bytes of weights, tensor-parallel size, and how often."""
ARCHITECTURES = ("LlamaForCausalLM", "QwenForCausalLM", "MixtralForCausalLM")
ON_SSD, IN_DRAM, SPLIT_ON_SSD = 40, 8, 4
"""Models that a node's storage agent holds."""
RATES = {Tier.DRAM: 20 * GB, Tier.SSD: 8 * GB, Tier.PEER: 7 * GB, Tier.REMOTE: GB}
"""Bytes per second that nodes are taught."""
CAPTIVE_BYTES = 40 * GB
_CROWD = 4  # of the smallest models on a GPU: no room is left for another one
STARTS_PER_NODE = 1 / 40
"""Starts that go on at the same time."""
PACE_MS = 20
"""Between two decisions."""
KINDS = ("dram", "ssd", "peer", "remote", "tensor_parallel", "migrate")
"""What decisions are for: a model that lies in DRAM somewhere, on SSDs, only on nodes without room, nowhere; one that takes
several GPUs; and one that lies in DRAM where all GPUs are busy, but for which room can be made by moving somebody."""
MIX = ("dram", "ssd", "peer", "remote", "tensor_parallel") * 9 + ("migrate",) * 5
"""Of fifty decisions: a tenth needs room by migration."""


class World:
    """Builds the cluster, and plays what goes on in it. `seed` decides everything."""

    def __init__(self, *, nodes: int, devices: int, models: int, seed: int) -> None:
        self.chance = Dice(seed)
        self.cluster = Cluster(migrates=True)
        self._devices = devices
        self._names = [f"n{number:05}" for number in range(nodes)]
        sizes = [(weight_bytes, ranks) for weight_bytes, ranks, often in SIZES for _ in range(often)]
        self._models = [self._model(number, *self.chance.choice(sizes)) for number in range(models)]
        for model in self._models:
            self.cluster.put_model(model)
        self._single = [m for m in self._models if m.tensor_parallel == 1]
        self._split = [m for m in self._models if m.tensor_parallel > 1]
        self._unheld = self._single[: len(self._single) // 10]
        self._heldable = self._single[len(self._unheld) :]
        self._running = self._heldable[::2]
        """Only these have instances; the others are asked for."""
        self._small = [m for m in self._running if m.weight_bytes == SIZES[0][0]]
        self._serial = 0
        self._busy = self._names[::5]
        self._held: dict[str, dict[str, tuple[int, int]]] = {}
        self._starts: list[str] = []
        for name in self._names:
            self._furnish(name)
        self._captive = [self._model(models + number, CAPTIVE_BYTES, 1) for number in range(len(self._busy))]
        for name, model in zip(self._busy, self._captive, strict=True):
            self.cluster.put_model(model)
            self._held[name][model.model_id] = (model.weight_bytes, 0)
            self.cluster.put_holdings(name, self._held[name])
        self._wanted = {
            "dram": self._lying(in_dram=True),
            "ssd": self._lying(in_dram=False),
            "peer": self._only_on_busy(),
            "remote": self._unheld,
            "tensor_parallel": self._split,
            "migrate": self._captive,
        }

    def _model(self, number: int, weight_bytes: int, ranks: int) -> ModelSpec:
        return ModelSpec(
            model_id=f"m{number:05}",
            name=f"m{number:05}",
            source=f"s3://models/m{number:05}",
            architecture=ARCHITECTURES[number % len(ARCHITECTURES)],
            dtype="bfloat16",
            weight_bytes=weight_bytes,
            max_model_len=8192,
            vocab_size=32000,
            kv_bytes_per_token=131072,
            kv_cache_bytes=weight_bytes // 4,
            slots=8,
            keep_alive_s=3600.0,  # nobody is stopped for being idle: only what is asked for is decided
            engine=EngineKind.VLLM,
            tensor_parallel=ranks,
        )

    def _furnish(self, name: str) -> None:
        cluster = self.cluster
        devices = tuple(
            Device(index=i, kind=DeviceKind.CUDA, name="H100", memory_bytes=GPU_BYTES) for i in range(self._devices)
        )
        cluster.put_node(NodeView(name=name, devices=devices, prepared=ARCHITECTURES))
        held = {m.model_id: (0, m.weight_bytes) for m in self._some(self._heldable, ON_SSD)}
        held |= {m.model_id: (m.weight_bytes, m.weight_bytes) for m in self._some(self._heldable, IN_DRAM)}
        held |= {m.model_id: (0, m.weight_bytes) for m in self._some(self._split, SPLIT_ON_SSD)}
        self._held[name] = held
        cluster.put_holdings(name, held)
        self._teach(name)
        for index in range(self._devices):
            self._occupy(name, index)

    def _some(self, among: Sequence[ModelSpec], count: int) -> list[ModelSpec]:
        """So many of them, or one less for each that was drawn twice."""
        return list({m.model_id: m for m in (self.chance.choice(among) for _ in range(count))}.values())

    def _occupy(self, name: str, index: int) -> None:
        """Of ordinary nodes a fifth of the devices is free and a fifth holds somebody idle; of busy ones none, and they are full."""
        full, fate = name in self._busy, self.chance.unit()
        if not full and fate < 0.2:
            return
        free_bytes = GPU_BYTES
        for _ in range(_CROWD if full else self.chance.choice((1, 2, 3))):
            model = self.chance.choice(self._small if full else self._running)
            if model.gpu_bytes <= free_bytes:
                free_bytes -= model.gpu_bytes
                self.cluster.put_instance(self._instance(name, (index,), model, idle=not full and fate < 0.4))

    def _instance(self, name: str, devices: tuple[int, ...], model: ModelSpec, *, idle: bool) -> InstanceView:
        self._serial += 1
        running = 0 if idle else self.chance.between(1, 6)
        return InstanceView(
            instance_id=f"i{self._serial:07}",
            model_id=model.model_id,
            node=name,
            devices=devices,
            state=InstanceState.READY,
            gpu_bytes=model.gpu_bytes,
            running=running,
            running_tokens=running * self.chance.between(100, 3000),
            generated_tokens=self.chance.between(0, 500),
            token_s=0.03,
            idle_ms=self.chance.between(0, 50_000) if idle else 0,
        )

    def _teach(self, name: str) -> None:
        """Starts and migrations that were seen there."""
        estimates, chance = self.cluster.estimates, self.chance
        model = self._single[0]
        for tier, bytes_per_s in RATES.items():
            estimates.observe_tier(name, tier, bytes_per_s * (0.9 + 0.2 * chance.unit()))
            for _ in range(3):
                seen = StartSeen(
                    node=name,
                    model_id=model.model_id,
                    architecture=model.architecture,
                    engine_kind=model.engine,
                    engine=EngineState.ZYGOTE,
                    weight_bytes=model.weight_bytes,
                    source=tier,
                    origin="s3" if tier is Tier.REMOTE else "",
                    load_s=model.weight_bytes / bytes_per_s * (0.9 + 0.3 * chance.unit()),
                    engine_s=1.1 + 0.7 * chance.unit(),
                )
                estimates.observe_start(seen)
        for tokens in (500, 4000):
            estimates.observe_migration(name, tokens, 0.1 + tokens / 10_000)

    def _lying(self, *, in_dram: bool) -> list[ModelSpec]:
        """Models that lie on nodes that have room or could make some: in DRAM somewhere, or on SSDs only."""
        busy, holders = set(self._busy), self.cluster.holders
        found = []
        for model in self._heldable[1::2]:
            sites = holders.get(model.model_id, {})
            lies_in_dram = [name for name, site in sites.items() if site.model_bytes[model.model_id][0]]
            if any(name not in busy for name in (lies_in_dram if in_dram else sites)) and in_dram == bool(lies_in_dram):
                found.append(model)
        return found

    def _only_on_busy(self) -> list[ModelSpec]:
        """Models on SSDs of nodes without room alone: some others go there, so that there are enough."""
        found = []
        for name in self._busy:
            model = self._unheld.pop()
            self._held[name][model.model_id] = (0, model.weight_bytes)
            self.cluster.put_holdings(name, self._held[name])
            found.append(model)
        return found

    def want(self, kind: str) -> ModelSpec:
        """A model to ask for, that is not there."""
        while self.cluster.serving((model := self.chance.choice(self._wanted[kind])).model_id):
            pass  # one of those that this benchmark started a moment ago
        return model

    def delta(self) -> Callable[[], None]:
        """What one node's worker and storage agent say a second later. The call applies it; nothing is prepared for it."""
        name = self.chance.choice(self._names)
        site = self.cluster.sites[name]
        node = site.view
        assert node is not None
        said = list(site.instances.values())
        held = dict(self._held[name])
        # Something always changed: one model is held a little more or less.
        changed = self.chance.choice(sorted(held))
        dram_bytes, ssd_bytes = held[changed]
        self._held[name] = held | {changed: (dram_bytes, max(1, ssd_bytes - 1))}

        def apply() -> None:
            cluster = self.cluster
            cluster.now_ms += PACE_MS
            cluster.put_node(replace(node))
            for view in said:
                busy = view.running > 0
                cluster.put_instance(
                    replace(
                        view,
                        idle_ms=0 if busy else cluster.idle_ms(view),
                        age_ms=cluster.age_ms(view),
                        running_tokens=view.running_tokens + busy,
                    )
                )
            cluster.put_holdings(name, self._held[name])

        return apply

    def decide(self, model: ModelSpec, apply: Callable[[], None]) -> Decision:
        """What is timed: a status and a demand come, and are decided on."""
        apply()
        self.cluster.put_demand(DemandView(model_id=model.model_id, queued=1, oldest_wait_ms=0))
        decided = decide(self.cluster)
        [decision] = [one for one in decided.placements if one.model_id == model.model_id]
        return decision

    def follow(self, decision: Decision) -> None:
        """Starts go on for a while, then end; so the cluster stays as full as it was. Nobody is stopped or moved for good."""
        self.cluster.drop_demand(decision.model_id)
        for command in decision.commands:
            if isinstance(command, Start):
                model = self.cluster.models[command.model_id]
                view = self._instance(command.node, command.devices, model, idle=True)
                view = replace(view, state=InstanceState.STARTING, load=command.load, idle_ms=0)
                self.cluster.put_instance(view)
                self._starts.append(view.instance_id)
        if len(self._starts) > STARTS_PER_NODE * len(self._names):
            self.cluster.drop_instance(self._starts.pop(0))
