"""Small clusters for policy tests, and a strategy for random ones."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st
from tests.support.fake_worker import GIB, model_spec

from stoker_contracts.models import Device, DeviceKind, EngineKind, InstanceState, ModelSpec
from stoker_policy import (
    Cluster,
    Command,
    DemandView,
    FailureView,
    HeldView,
    InstanceView,
    NodeView,
)
from stoker_policy import (
    decide as decide_policy,
)

NEED_BYTES = model_spec("a").gpu_bytes  # 1.65 GiB: one fits a slot of 2 GiB, two fit one of 4 GiB


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that a cluster is told. The order of the tuples means nothing."""

    nodes: tuple[NodeView, ...] = ()
    instances: tuple[InstanceView, ...] = ()
    models: tuple[ModelSpec, ...] = ()
    demands: tuple[DemandView, ...] = ()
    failures: tuple[FailureView, ...] = ()
    held: tuple[HeldView, ...] = ()

    def cluster(self, *, migrates: bool = False) -> Cluster:
        facts = {name: getattr(self, name) for name in self.__struct_fields__}
        return Cluster(**facts, migrates=migrates)


def decide(facts: Facts) -> list[Command]:
    """The commands of a decision."""
    return decide_policy(facts.cluster()).commands


def node(name: str = "n1", slots: int = 1, memory_bytes: int = 2 * GIB, **fields: object) -> NodeView:
    values: dict[str, object] = {"prepared": ("LlamaForCausalLM",)}
    values["devices"] = gpus(slots, memory_bytes)
    return NodeView(name=name, **(values | fields))  # type: ignore[arg-type]


def gpus(count: int, memory_bytes: int) -> tuple[Device, ...]:
    return tuple(Device(index=i, kind=DeviceKind.CUDA, name="", memory_bytes=memory_bytes) for i in range(count))


def instance(instance_id: str, model_id: str, **fields: object) -> InstanceView:
    values: dict[str, object] = {
        "node": "n1",
        "devices": (0,),
        "state": InstanceState.READY,
        "gpu_bytes": NEED_BYTES,
    }
    return InstanceView(instance_id=instance_id, model_id=model_id, **(values | fields))  # type: ignore[arg-type]


def demand(model_id: str, queued: int = 1, oldest_wait_ms: int = 0) -> DemandView:
    return DemandView(model_id=model_id, queued=queued, oldest_wait_ms=oldest_wait_ms)


_MODEL_IDS = ("a", "b", "c", "d", "e")
_NODES = ("n1", "n2", "n3")


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelSpec, ...]:
    chosen = draw(st.lists(st.sampled_from(_MODEL_IDS), unique=True, min_size=2))
    return tuple(
        model_spec(
            model_id,
            weight_bytes=draw(st.integers(1, 12)) * (GIB // 4),
            kv_cache_bytes=draw(st.integers(0, 4)) * (GIB // 4),
            architecture=draw(st.sampled_from(("LlamaForCausalLM", "QwenForCausalLM"))),
            engine=draw(st.sampled_from((EngineKind.VLLM, EngineKind.SIM))),
            keep_alive_s=draw(st.sampled_from((0.0, 1.0, 60.0))),
            tensor_parallel=draw(st.sampled_from((1, 1, 1, 2))),
        )
        for model_id in chosen
    )


@st.composite
def nodes(draw: st.DrawFn) -> tuple[NodeView, ...]:
    usually = st.sampled_from((True,) * 7 + (False,))
    return tuple(
        NodeView(
            name=name,
            devices=tuple(
                Device(
                    index=i,
                    kind=draw(st.sampled_from((DeviceKind.CPU, DeviceKind.CUDA))),
                    name="",
                    memory_bytes=draw(st.sampled_from((1, 2, 2, 3, 8))) * GIB,
                )
                for i in range(draw(st.integers(0, 3)))
            ),
            answered=draw(usually),
            silent=not draw(usually),
            draining=not draw(usually),
            zygote_ready=draw(usually),
            prepared=draw(st.sampled_from(((), ("LlamaForCausalLM",)))),
        )
        for name in draw(st.lists(st.sampled_from(_NODES), unique=True))
    )


@st.composite
def crowded(draw: st.DrawFn) -> Facts:
    """Every device is taken, and somebody wants what does not run: room has to be made."""
    homes = [(name, index) for name in _NODES[: draw(st.integers(1, 2))] for index in range(draw(st.integers(1, 2)))]
    names = {name for name, _ in homes}
    instances = tuple(
        instance(
            f"i{number}",
            draw(st.sampled_from(_MODEL_IDS[1:])),
            node=name,
            devices=(index,),
            gpu_bytes=draw(st.sampled_from((GIB, GIB, 2 * GIB))),
            running=draw(st.sampled_from((0, 0, 1))),
            idle_ms=draw(st.sampled_from((0, 10, 10, 500))),
            stop_asked_ms=draw(st.sampled_from((None,) * 7 + (100,))),
            stops=1,
        )
        for number, (name, index) in enumerate(homes * 2)
    )
    return Facts(
        nodes=tuple(node(name, slots=2, memory_bytes=2 * GIB) for name in sorted(names)),
        instances=instances,
        models=tuple(model_spec(m, kv_cache_bytes=draw(st.sampled_from((0, GIB // 2)))) for m in _MODEL_IDS),
        demands=tuple(
            demand(m, 1, draw(st.sampled_from((0, 5))))
            for m in sorted({"a", *draw(st.lists(st.sampled_from(_MODEL_IDS)))})
        ),
    )


@st.composite
def anything(draw: st.DrawFn) -> Facts:
    """Any cluster, consistent or not: devices may be over-committed already, instances on nodes that nobody knows."""
    return Facts(
        nodes=draw(nodes()),
        models=draw(models()),
        instances=tuple(
            InstanceView(
                instance_id=f"i{number}",
                model_id=draw(st.sampled_from(_MODEL_IDS)),
                node=draw(st.sampled_from(_NODES)),
                devices=draw(st.sampled_from(((0,), (0,), (1,), (0, 1)))),
                state=draw(
                    st.sampled_from((*InstanceState, InstanceState.READY, InstanceState.READY, InstanceState.READY))
                ),
                gpu_bytes=draw(st.sampled_from((None, 0, GIB, GIB, 2 * GIB, 2 * GIB, 4 * GIB))),
                running=draw(st.sampled_from((0, 0, 1))),
                idle_ms=draw(st.sampled_from((0, 500, 2000, 70_000))),
                stop_asked_ms=draw(st.sampled_from((None, None, 0, 100_000))),
                stops=draw(st.integers(0, 8)),
            )
            for number in range(draw(st.integers(0, 6)))
        ),
        demands=tuple(
            demand(model_id, draw(st.sampled_from((1, 1, 3, 0))), draw(st.sampled_from((0, 0, 10, 500))))
            for model_id in draw(st.lists(st.sampled_from(_MODEL_IDS), unique=True))
        ),
        failures=tuple(
            FailureView(model_id=model_id, in_row=draw(st.integers(1, 9)), since_ms=draw(st.integers(0, 70_000)))
            for model_id in draw(st.lists(st.sampled_from(_MODEL_IDS), unique=True, max_size=2))
        ),
        held=tuple(
            HeldView(
                node=name,
                model_id=draw(st.sampled_from(_MODEL_IDS)),
                dram_bytes=draw(st.integers(0, 2)) * GIB,
                ssd_bytes=draw(st.integers(0, 2)) * GIB,
            )
            for name in draw(st.lists(st.sampled_from(_NODES), unique=True))
        ),
    )


def clusters() -> st.SearchStrategy[Facts]:
    return st.one_of(anything(), crowded())
