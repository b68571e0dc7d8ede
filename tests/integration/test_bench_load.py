"""`stoker bench load` for real, on a checkpoint that is too small for its figures to mean anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stoker_cli.bench import page_cache

CONTESTANTS = "sequential,stoker,safetensors,torch"


def bench(*arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stoker_cli", "bench", "load", "--rest-s", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with a checkpoint of 50 MB, left by a run that measured everyone and wrote load.json beside."""
    work = tmp_path_factory.mktemp("bench")
    done = bench("--gb", "0.05", "--rounds", "1", "--only", CONTESTANTS, "--work", str(work / "work"),
                 "--json", str(work / "load.json"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_a_run_measures_everyone_and_finds_every_tensor_right(made: Path) -> None:
    report = json.loads((made / "load.json").read_bytes())
    figures = report["figures"]
    assert {"cold_over_device", "cold_over_safetensors", "cold_over_torch", "cold_gb_per_s", "device_gb_per_s",
            "pool_ready_ms", "pool_verify_ms", "extra_memory_mib"} <= figures.keys()  # fmt: skip
    assert all(value > 0 for name, value in figures.items() if name.endswith("_s"))
    assert figures["tensors"] == 219
    assert len(report["rounds"]) == 1


def test_a_load_leaves_nothing_in_the_page_cache_and_no_copy_in_memory(made: Path) -> None:
    figures = json.loads((made / "load.json").read_bytes())["figures"]
    assert figures["stoker_page_cache_mib"] < 2
    assert figures["extra_memory_mib"] < 24  # half of the checkpoint


def test_a_directory_can_be_taken_as_it_is(made: Path, tmp_path: Path) -> None:
    given = made / "work" / "made-50000000"
    before = sorted(given.iterdir())
    done = bench("--path", str(given), "--rounds", "1", "--only", "stoker", "--work", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "219 tensors" in done.stdout
    assert sorted(given.iterdir()) == before


def test_a_wrong_tensor_ends_the_run(made: Path, tmp_path: Path) -> None:
    for folder in (made / "work").glob("made-*/digests"):
        record = json.loads((folder / "tensors.json").read_bytes())
        first = min(record)
        right = record[first][1]
        record[first][1] = "0" * 32
        (folder / "tensors.json").write_text(json.dumps(record))
        try:
            done = bench("--gb", "0.05", "--rounds", "1", "--only", "stoker", "--work", str(made / "work"))
        finally:
            record[first][1] = right
            (folder / "tensors.json").write_text(json.dumps(record))
        assert done.returncode == 1
        assert f"stoker yields wrong bytes in 1 tensors: {first}" in done.stderr


def test_what_is_cached_is_seen_and_dropped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(8 * 2**20))
    assert page_cache.cached_bytes([file]) == 8 * 2**20
    page_cache.drop([file])
    assert page_cache.cached_bytes([file]) == 0
    with file.open("rb") as opened:
        opened.read(2**20)
    assert page_cache.cached_bytes([file]) >= 2**20


def test_nothing_of_its_own_directory_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_HOME", str(tmp_path / "home"))
    done = bench("--gb", "0.01", "--rounds", "1", "--only", "safetensors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "home").iterdir()) == []
