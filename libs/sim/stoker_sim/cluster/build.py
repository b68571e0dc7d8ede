"""A simulated cluster from a profile."""

from __future__ import annotations

import msgspec

from stoker_contracts.models import ModelSpec
from stoker_core.errors import InvalidProfile, InvalidWorkload
from stoker_sim.cluster.by_chance import AtRandom, Cached
from stoker_sim.cluster.estimating import ServerlessLLM, Shepherd
from stoker_sim.cluster.floor import Physics
from stoker_sim.cluster.lines import Line
from stoker_sim.cluster.nodes import Node
from stoker_sim.cluster.orders import Policy
from stoker_sim.cluster.stoker import Stoker
from stoker_sim.cluster.world import World
from stoker_sim.dice import Dice
from stoker_sim.profiles import ModelProfile, NodeKind, Profile

POLICIES: dict[str, str] = {
    "random": "safetensors",
    "cache": "safetensors",
    "shepherd": "serverlessllm",
    "serverlessllm": "serverlessllm",
    "stoker": "stoker",
}
"""Policy → the loader that its system has."""
_CLASSES = {c.name: c for c in (AtRandom, Cached, Shepherd, ServerlessLLM, Stoker)}
REPLICAS_MAX = 64
_BESIDE = 1.1
"""What an instance takes of a GPU, beside its weights and KV cache: as ModelSpec.gpu_bytes has it."""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What of a cluster is not in its profile. The same for every policy, but for the loader.

    loader: '': the policy's own.  exclusive: an instance's KV cache takes all that is left of its devices, as vLLM's does by
    default, so that each serves one model at a time.
    """

    keep_alive_s: float = 60.0
    exclusive: bool = True
    loader: str = ""
    migrates: bool = True
    physics: Physics = Physics()


def build(profile: Profile, policy: str, *, seed: int, setup: Setup | None = None) -> World:
    """The models lie on the nodes' SSDs in turn, for systems that keep them there. Raises InvalidWorkload, InvalidProfile."""
    setup = setup or Setup()
    if policy not in POLICIES:
        raise InvalidWorkload(f"there is no policy {policy!r}, but {', '.join(POLICIES)}")
    loader = profile.loaders_by_name.get(setup.loader or POLICIES[policy])
    if loader is None:
        raise InvalidProfile(
            "profile", f"has no loader {setup.loader or POLICIES[policy]!r}, but {', '.join(profile.loaders_by_name)}"
        )
    kinds = profile.hardware.by_name
    lines = {name: Line(name, _spec(name, kind, profile, setup), kind) for name, kind in profile.models_by_name.items()}
    chosen = _CLASSES[policy]
    told: list[Policy] = []

    def news(node: str, name: str, in_dram: bool, on_ssd: bool) -> None:
        told[0].held(node, name, in_dram, on_ssd)

    nodes = {
        name: Node(name, kind, loader, tiers=chosen.tiers, eviction=chosen.eviction, news=news)
        for name, kind in kinds.items()
    }
    told.append(_policy(policy, nodes, lines, seed, setup))
    if chosen.preloaded:
        names = list(nodes)
        for index, line in enumerate(lines.values()):
            nodes[names[index % len(names)]].stock(line, 0.0)
    return World(nodes, lines, told[0], setup.physics)


def _policy(name: str, nodes: dict[str, Node], lines: dict[str, Line], seed: int, setup: Setup) -> Policy:
    dice = Dice(seed, f"policy/{name}")
    if name == "random":
        return AtRandom(dice)
    if name == "cache":
        return Cached(dice)
    if name == "stoker":
        return Stoker(nodes, lines, migrates=setup.migrates)
    return Shepherd() if name == "shepherd" else ServerlessLLM()


def _spec(name: str, kind: ModelProfile, profile: Profile, setup: Setup) -> ModelSpec:
    hosts = [node for node in profile.hardware.nodes if node.devices.count >= kind.ranks]
    kv_cache_bytes = max((_rest_bytes(kind, node) for node in hosts), default=0) if setup.exclusive else 0
    return ModelSpec(
        model_id=name,
        name=name,
        source=f"s3://models/{name}",
        architecture=kind.name,
        dtype="float16",
        weight_bytes=kind.weight_bytes,
        max_model_len=kind.context_tokens,
        vocab_size=1,
        kv_bytes_per_token=kind.kv_bytes_per_token,
        kv_cache_bytes=max(kind.kv_cache_bytes, kv_cache_bytes),
        slots=kind.slots,
        keep_alive_s=setup.keep_alive_s,
        wait_s=setup.physics.timeout_s,
        tensor_parallel=kind.ranks,
        max_replicas=min(REPLICAS_MAX, max(1, profile.hardware.device_count // kind.ranks)),
    )


def _rest_bytes(kind: ModelProfile, node: NodeKind) -> int:
    """What the KV cache has if an instance takes its devices whole; of nodes that differ, of those with the most."""
    return int(node.devices.memory_bytes * kind.ranks / _BESIDE * 0.9999) - kind.weight_bytes
