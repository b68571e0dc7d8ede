"""`stoker sim`: what its commands print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker_cli.main import app
from stoker_core.errors import InvalidTrace, InvalidWorkload


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["sim", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_paper_prints_a_row_for_each_policy_beside_the_papers_figures_and_writes_what_it_printed(
    tmp_path: Path,
) -> None:
    output = invoke(
        "paper", "--quick", "--requests", "20", "--json", str(tmp_path / "p.json"), "--policies", "cache,stoker"
    )
    assert "17.9" in output  # of Ray Serve with a cache, on ShareGPT
    written = json.loads((tmp_path / "p.json").read_text())
    assert [r["policy"] for r in written["rounds"]] == ["cache", "stoker"] * 6
    assert written["figures"]["workloads"] == 6
    ratios = {}
    for r in written["rounds"]:
        ratios.setdefault((r["dataset"], r["rps"]), {})[r["policy"]] = r["startup_p99_s"]
    worst = max(of["stoker"] / of["cache"] for of in ratios.values())
    assert written["figures"]["worst_p99_over_best_other"] == pytest.approx(worst, abs=1e-3)


def test_plots_are_png_files_one_for_each_model_and_dataset(tmp_path: Path) -> None:
    invoke("paper", "--quick", "--requests", "5", "--policies", "cache,serverlessllm", "--plots", str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "sim-paper-opt-6.7b-gsm8k.png",
        "sim-paper-opt-6.7b-sharegpt.png",
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())


def test_run_takes_a_trace_and_several_policies(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,100,20\n2023-11-16 18:00:09.5,50,5\n"
    )
    output = invoke(
        "run", "--workload", f"azure-llm:{trace}", "--policy", "random,stoker", "--json", str(tmp_path / "r.json")
    )
    assert "random" in output
    written = json.loads((tmp_path / "r.json").read_text())
    assert [(r["policy"], r["requests"]) for r in written["rounds"]] == [("random", 2), ("stoker", 2)]


def test_scale_says_how_much_was_simulated_and_how_long_it_took(tmp_path: Path) -> None:
    output = invoke(
        "scale", "--profile", "h100", "--requests", "50", "--duration-s", "10", "--json", str(tmp_path / "s.json")
    )
    assert "4 nodes" in output
    figures = json.loads((tmp_path / "s.json").read_text())["figures"]
    assert figures["requests"] == 50
    assert figures["wall_s"] >= 0


def test_a_workload_that_there_is_not_is_named_and_so_is_a_file_that_cannot_be_read() -> None:
    with pytest.raises(InvalidWorkload, match="no workload 'steady'"):
        invoke("run", "--workload", "steady")
    with pytest.raises(InvalidWorkload, match="no lengths 'long'"):
        invoke("run", "--lengths", "long")
    with pytest.raises(InvalidTrace, match=r"none\.csv"):
        invoke("run", "--workload", "azure-llm:none.csv")
