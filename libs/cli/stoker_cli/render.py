"""Answers as text for people: pure functions from answers to tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from stoker_cli.answers import Deployed, Instance, Model, Node, NodeLink, Phases, Prefetched

STATE_STYLES = {"ready": "green", "starting": "yellow", "stopping": "yellow", "failed": "red"}


def size(count: float) -> str:
    """Bytes with a binary unit: 256.6 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def percent(part: int, whole: int) -> str:
    """Rounded down: 100% is all of it."""
    return f"{100 * part // whole if whole else 0}%"


def duration(ms: float) -> str:
    """1.2 s, 3 min, 2.5 h, 4.1 d."""
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def state(name: str) -> str:
    style = STATE_STYLES.get(name)
    return f"[{style}]{name}[/]" if style else name


def phases(spent: Phases) -> str:
    """Where a start went: '1.42 s = fork 12 + lease 3 + …' in milliseconds; '' before it is known."""
    parts = {
        "fork": spent.fork_ms,
        "lease": spent.lease_ms,
        "load": spent.load_ms,
        "engine": spent.engine_ms,
        "announce": spent.announce_ms,
    }
    total = sum(parts.values())
    if not total:
        return ""
    return f"{total / 1000:.2f} s = " + " + ".join(f"{name} {ms:.0f}" for name, ms in parts.items())


def _table(*headers: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", no_wrap=header in ("NAME", "ID"))
    return table


def models_table(models: Sequence[Model]) -> Table:
    """One line a model, with its running instances."""
    table = _table("NAME", "ARCHITECTURE", "DTYPE", "SIZE", "CONTEXT", "KV", "SLOTS", "KEEP-ALIVE", "INSTANCES",
                   right=("SIZE", "CONTEXT", "KV", "SLOTS"))  # fmt: skip
    for model in models:
        running = ", ".join(f"{state(i.state)} on {i.node}" for i in model.instances) or "[dim]none[/]"
        engine = "" if model.engine == "vllm" else f" [yellow]({model.engine} engine: no real model)[/]"
        table.add_row(
            model.name + engine,
            model.architecture,
            model.dtype,
            size(model.weight_bytes),
            str(model.max_model_len),
            size(model.kv_cache_bytes),
            str(model.slots),
            duration(model.keep_alive_s * 1000),
            running,
        )
    return table


def tiers_table(models: Sequence[Model]) -> Table:
    """One line per model, node and tier: how much of the model lies there."""
    table = _table("NAME", "NODE", "TIER", "HELD", "OF", "", right=("HELD", "OF"))
    for model in models:
        for tier in model.tiers:
            table.add_row(
                model.name,
                tier.node,
                tier.tier,
                size(tier.held_bytes),
                size(tier.total_bytes),
                percent(tier.held_bytes, tier.total_bytes),
            )
        if not model.tiers:
            table.add_row(model.name, "[dim]in no tier yet[/]", "", "", "", "")
    return table


def instances_table(instances: Sequence[Instance]) -> Table:
    """One line an instance; a failed one says why."""
    table = _table("ID", "MODEL", "NODE", "STATE", "DEVICES", "RUNNING", "ROOM", "IDLE", "AGE", "FROM", "START",
                   right=("RUNNING", "ROOM"))  # fmt: skip
    for instance in instances:
        table.add_row(
            instance.instance_id,
            instance.model,
            instance.node,
            state(instance.state),
            ",".join(map(str, instance.devices)),
            str(instance.running),
            str(instance.room),
            duration(instance.idle_ms),
            duration(instance.age_ms),
            source(instance),
            escape(instance.failure) or phases(instance.phases),
        )
    return table


def source(instance: Instance) -> str:
    """Where its weights came from: 'dram', 'remote (s3)', 'peer (node-b)'; '' before it is known."""
    if instance.load_source in ("", "unknown"):
        return ""
    return escape(f"{instance.load_source} ({instance.load_origin})" if instance.load_origin else instance.load_source)


def link(seen: NodeLink) -> str:
    """'from node-b: 1.2 GiB/s, 3.4 GiB so far'."""
    rate = f"{size(seen.read_bytes_per_s)}/s, " if seen.read_bytes_per_s else ""
    return f"from {seen.peer}: {rate}{size(seen.read_bytes)} so far"


def nodes_table(nodes: Sequence[Node]) -> Table:
    """One line a node: devices, tiers, links to peers, and whether it can start instances."""
    table = _table("NAME", "STATE", "DEVICES", "TIERS", "LINKS", "PREPARED")
    for node in nodes:
        status = "draining" if node.draining else "ready" if node.zygote_ready else "starting"
        table.add_row(
            node.node,
            state(status),
            "\n".join(f"{d.index}: {escape(d.name)} ({d.kind}, {size(d.memory_bytes)})" for d in node.devices),
            "\n".join(f"{t.tier}: {size(t.used_bytes)} of {size(t.capacity_bytes)}" for t in node.tiers),
            "\n".join(link(seen) for seen in node.links),
            "\n".join(node.prepared),
        )
    return table


def prefetched(answer: Prefetched) -> str:
    """What was ordered, for the terminal."""
    where = ", ".join(answer.nodes) or "all live nodes"
    if answer.cancel:
        return f"{answer.model}: prefetch given up on {where}"
    return f"{answer.model}: prefetch to {answer.tier} ordered on {where}; `stoker models --tiers` shows how far it is"


def deployed(answer: Deployed) -> str:
    """What was registered, for the terminal."""
    model = answer.model
    what = "registered" if answer.created else "was registered already with the same contents"
    return (
        f"{model.name} {what}: {model.architecture}, {model.dtype}, {size(model.weight_bytes)} of weights, "
        f"context {model.max_model_len} tokens, KV cache {size(model.kv_cache_bytes)} for {model.slots} requests at once"
    )
