"""Recorded answers of the admin API as tables."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from stoker_cli import answers, render
from stoker_cli.client import failure, parse
from stoker_core.errors import ApiFailed

MODELS = json.loads("""
{"models": [
  {"name": "smollm2-135m", "model_id": "model-1", "source": "file:///m", "architecture": "LlamaForCausalLM",
   "dtype": "bfloat16", "weight_bytes": 269060552, "max_model_len": 8192, "kv_cache_bytes": 188743680, "slots": 8,
   "engine": "vllm", "keep_alive_s": 60.0, "added_later": 1,
   "instances": [{"instance_id": "i-1", "node": "n1", "state": "ready"}],
   "tiers": [{"node": "n1", "tier": "ssd", "held_bytes": 134530276, "total_bytes": 269060552},
             {"node": "n2", "tier": "dram", "held_bytes": 269060551, "total_bytes": 269060552}]},
  {"name": "toy", "model_id": "model-2", "source": "file:///t", "architecture": "LlamaForCausalLM",
   "dtype": "float32", "weight_bytes": 1000, "max_model_len": 128, "kv_cache_bytes": 1024, "slots": 2,
   "engine": "sim", "keep_alive_s": 7200.0, "instances": [], "tiers": []}]}
""")
INSTANCES = json.loads("""
{"instances": [
  {"instance_id": "i-1", "model": "smollm2-135m", "node": "n1", "state": "ready", "devices": [0, 1], "room": 7,
   "running": 1, "idle_ms": 0, "age_ms": 90000, "load_source": "ssd", "failure": "", "engine": "vllm",
   "phases": {"fork_ms": 12.4, "lease_ms": 3.0, "load_ms": 400.0, "engine_ms": 900.0, "announce_ms": 4.6}},
  {"instance_id": "i-2", "model": "toy", "node": "n1", "state": "failed", "devices": [1], "failure": "engine [died]",
   "load_source": "unknown"},
  {"instance_id": "i-3", "model": "toy", "node": "n2", "state": "ready", "load_source": "peer", "load_origin": "n1"},
  {"instance_id": "i-4", "model": "toy", "node": "n2", "state": "ready", "load_source": "remote", "load_origin": "s3"}]}
""")
NODES = json.loads("""
{"nodes": [
  {"node": "n1", "boot_id": "b", "zygote_ready": true, "draining": false, "prepared": ["LlamaForCausalLM"],
   "devices": [{"index": 0, "kind": "cpu", "name": "CPU slot, 1 thread", "memory_bytes": 10737418240}],
   "tiers": [{"tier": "ssd", "capacity_bytes": 53687091200, "used_bytes": 269060552}],
   "links": [{"peer": "n2", "read_bytes_per_s": 1288490188.8, "read_bytes": 3650722201},
             {"peer": "n3", "read_bytes_per_s": 0.0, "read_bytes": 0}]},
  {"node": "n2", "zygote_ready": false}]}
""")


def text(table: Table) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=240, highlight=False).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_models_show_size_context_and_where_they_run() -> None:
    header, real, toy = text(render.models_table(parse(MODELS, answers.Models).models))
    assert header.split()[:3] == ["NAME", "ARCHITECTURE", "DTYPE"]
    assert "256.6 MiB" in real
    assert "8192" in real
    assert "ready on n1" in real
    assert "toy (sim engine: no real model)" in toy
    assert "2.0 h" in toy
    assert toy.endswith("none")


def test_tiers_show_how_much_of_a_model_is_held() -> None:
    _, half, nearly, toy = text(render.tiers_table(parse(MODELS, answers.Models).models))
    assert half.split() == ["smollm2-135m", "n1", "ssd", "128.3", "MiB", "256.6", "MiB", "50%"]
    assert nearly.split()[-1] == "99%", "only all of it is 100%"
    assert "in no tier yet" in toy


def test_instances_show_where_their_start_went_or_why_they_failed() -> None:
    _, ready, failed, *_ = text(render.instances_table(parse(INSTANCES, answers.Instances).instances))
    assert "1.32 s = fork 12 + lease 3 + load 400 + engine 900 + announce 5" in ready
    assert "0,1" in ready
    assert "ssd" in ready
    assert failed.endswith("engine [died]")
    assert "unknown" not in failed


def test_instances_show_where_their_weights_came_from() -> None:
    _, _, _, from_peer, from_store = text(render.instances_table(parse(INSTANCES, answers.Instances).instances))
    assert "peer (n1)" in from_peer
    assert "remote (s3)" in from_store


def test_nodes_show_devices_tiers_links_and_whether_they_can_start_instances() -> None:
    _, first, link, second = text(render.nodes_table(parse(NODES, answers.Nodes).nodes))
    assert "0: CPU slot, 1 thread (cpu, 10.0 GiB)" in first
    assert "ssd: 256.6 MiB of 50.0 GiB" in first
    assert "from n2: 1.2 GiB/s, 3.4 GiB so far" in first
    assert link.split() == ["from", "n3:", "0", "B", "so", "far"]
    assert second.split() == ["n2", "starting"]


def test_a_prefetch_says_what_was_ordered_where() -> None:
    one = answers.Prefetched(model="toy", nodes=["n1", "n2"], tier="ssd")
    assert render.prefetched(one) == (
        "toy: prefetch to ssd ordered on n1, n2; `stoker models --tiers` shows how far it is"
    )
    assert render.prefetched(answers.Prefetched(model="toy", cancel=True)) == "toy: prefetch given up on all live nodes"


def test_a_deployment_says_what_was_registered() -> None:
    answer = parse({"model": MODELS["models"][0], "created": False}, answers.Deployed)
    assert render.deployed(answer) == (
        "smollm2-135m was registered already with the same contents: LlamaForCausalLM, bfloat16, 256.6 MiB of weights, "
        "context 8192 tokens, KV cache 180.0 MiB for 8 requests at once"
    )


def test_an_answer_of_another_form_is_an_error() -> None:
    with pytest.raises(ApiFailed, match="not understood"):
        parse({"models": [{"name": 3}]}, answers.Models)


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")])
def test_sizes(count: int, shown: str) -> None:
    assert render.size(count) == shown


@pytest.mark.parametrize(
    ("ms", "shown"), [(0, "0.0 s"), (59900, "59.9 s"), (90000, "2 min"), (9e6, "2.5 h"), (3e8, "3.5 d")]
)
def test_durations(ms: float, shown: str) -> None:
    assert render.duration(ms) == shown


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "bad shard", "type": "x", "param": null, "code": "refused_checkpoint"}}', "bad shard"),
        ('{"error": {"message": "is wrong", "param": "slots"}}', "slots: is wrong"),
        ("<html>", "HTTP 400: <html>"),
        ("", "HTTP 400: no body"),
        ('{"error": "text"}', 'HTTP 400: {"error": "text"}'),
        ("[]", "HTTP 400: []"),
    ],
)
def test_error_answers_become_one_line(body: str, message: str) -> None:
    error = failure(400, body)
    assert error.message == message
    assert error.status == 400
