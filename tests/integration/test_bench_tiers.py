"""`stoker bench tiers` for real, on models that are too small for its figures to mean anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stoker_cli.bench.tiers_figures import FANS, WAYS


def bench(*arguments: str, timeout_s: float = 110.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stoker_cli", "bench", "tiers", "--rest-s", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, Any]:
    """What a run says that measured everything once."""
    done = bench("--gb", "0.04", "--fan-gb", "0.02", "--cap-mb", "1000", "--rounds", "1", "--work", str(work / "w"),
                 "--json", str(work / "tiers.json"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((work / "tiers.json").read_bytes())
    return found


def test_a_run_measures_everything_and_finds_every_tensor_right(report: dict[str, Any]) -> None:
    figures = report["figures"]
    assert {"pipelined_over_slowest_stage", "stepwise_over_slowest_stage", "peer_over_loopback", "chain4_over_1",
            "star4_over_1"} <= figures.keys()  # fmt: skip
    for name in (*WAYS, *FANS):
        assert figures[f"{name}_s"] > 0
        assert figures[f"{name}_gb_per_s"] > 0
    assert len(report["rounds"]) == 1


def test_receivers_take_every_byte_from_whom_they_are_meant_to(report: dict[str, Any]) -> None:
    assert {report["figures"][f"{name}_as_planned"] for name in FANS} == {1.0}


def test_of_its_work_only_the_models_are_left(report: dict[str, Any], work: Path) -> None:
    assert report["figures"]
    assert [path.name for path in (work / "w").iterdir()] == ["s3"]
    assert len(list((work / "w" / "s3" / "bench").iterdir())) == 2


def test_what_is_wrong_at_its_source_ends_the_run(report: dict[str, Any], work: Path) -> None:
    [folder] = [path for path in (work / "w" / "s3" / "bench").iterdir() if path.name == "made-40000000"]
    record = folder / "digests" / "tensors.json"
    right = record.read_bytes()
    tensors = json.loads(right)
    first = min(tensors)
    tensors[first][1] = "0" * 32
    record.write_text(json.dumps(tensors))
    try:
        done = bench("--gb", "0.04", "--rounds", "1", "--only", "s3", "--work", str(work / "w"))
    finally:
        record.write_bytes(right)
    assert done.returncode == 1
    assert f"from s3 come wrong bytes in 1 tensors: {first}" in done.stderr
