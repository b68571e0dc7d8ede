"""What `stoker bench place` measures, on a small cluster."""

from __future__ import annotations

import pytest

from stoker_cli.bench.place import figures, measure, percentile
from stoker_cli.bench.place_world import KINDS, World


def test_the_percentile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([3.0], 0.99) == 3.0


def test_growth_is_that_of_the_99th_percentile() -> None:
    rounds = [{"nodes": 5, "ms": 1.0}, {"nodes": 5, "ms": 2.0}, {"nodes": 10, "ms": 3.0}]
    assert figures(rounds, 5) == {
        "decision_ms_p50": 1.0,
        "decision_ms_p99": 2.0,
        "decision_ms_p99_double_nodes": 3.0,
        "growth": 1.5,
    }


@pytest.fixture(scope="module")
def rounds() -> list[dict[str, object]]:
    worlds = {count: World(nodes=count, devices=8, models=2000, seed=3) for count in (20, 40)}
    return list(measure(worlds, 100))


def test_every_kind_of_decision_is_measured_in_both_sizes(rounds: list[dict[str, object]]) -> None:
    assert {(r["nodes"], r["kind"]) for r in rounds} == {(n, kind) for n in (20, 40) for kind in KINDS}
    assert len(rounds) == 200


def test_a_tenth_of_the_decisions_is_for_room_that_somebody_has_to_make(rounds: list[dict[str, object]]) -> None:
    assert sum(r["kind"] == "migrate" for r in rounds) == len(rounds) / 10
    moved = [r for r in rounds if r["kind"] == "migrate" and r["how"] == "migrate"]
    assert len(moved) > len(rounds) / 20


def test_what_is_asked_for_is_mostly_decided_by_where_it_lies(rounds: list[dict[str, object]]) -> None:
    for kind in ("dram", "ssd", "peer", "remote"):
        of = [r for r in rounds if r["kind"] == kind]
        assert sum(r["source"] == kind for r in of) > len(of) / 2, kind


def test_the_same_seed_decides_the_same() -> None:
    def decided() -> list[tuple[object, object]]:
        return [(r["how"], r["source"]) for r in measure({20: World(nodes=20, devices=8, models=2000, seed=7)}, 50)]

    assert decided() == decided()
