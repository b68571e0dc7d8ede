"""What `stoker doctor` says of the native loader: the machine it runs on, and machines that refuse something."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from stoker_cli.doctor import examine, show
from stoker_cli.live_path import LivePath, shown, try_out

ALL_REFUSED = LivePath(
    directory="/home/x",
    reader="threads",
    gb_per_s={"threads": 1.25},
    missing={"io_uring": "Operation not permitted"},
    direct=False,
    pages="small",
    pages_refused="Invalid argument",
    lock_refused="Cannot allocate memory",
    memlock_bytes=8 << 20,
    hugetlb_free_bytes=0,
    cuda_missing="no CUDA driver: libcuda.so.1",
)


def test_the_live_path_is_tried_out_where_the_home_is_going_to_be_and_leaves_nothing(tmp_path: Path) -> None:
    problems: list[str] = []
    found = try_out(tmp_path / "not" / "yet", problems)
    assert found
    assert problems == []
    assert found.directory == str(tmp_path)
    assert found.reader in found.gb_per_s
    assert set(found.gb_per_s) | set(found.missing) == {"io_uring", "threads"}
    assert found.pages in ("hugetlb", "collapsed", "small")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert found.memlock_bytes == (-1 if soft == resource.RLIM_INFINITY else soft)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    problems: list[str] = []
    assert try_out(Path("/proc/self"), problems) is None
    assert len(problems) == 1
    assert "/proc/self" in problems[0]


def test_a_missing_native_module_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stoker_checkpoint._native", None)
    for name in ("stoker_checkpoint.pool", "stoker_checkpoint.probe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("stoker_checkpoint._native", raising=False)
    problems: list[str] = []
    assert try_out(tmp_path, problems) is None
    assert len(problems) == 1
    assert "native loader" in problems[0]


def test_what_the_kernel_refuses_is_shown_with_its_reason() -> None:
    text = shown(ALL_REFUSED)
    assert text["reader"] == "threads (threads 1.2 GB/s; no io_uring: Operation not permitted)"
    assert "through the page cache" in text["O_DIRECT"]
    assert "Invalid argument" in text["pool's pages"]
    assert text["locked memory"] == "refused: Cannot allocate memory (limit 8 MiB)"
    assert "libcuda" in text["CUDA"]


def test_the_report_has_the_live_path_for_people_and_for_programs(tmp_path: Path) -> None:
    report = asyncio.run(examine({"STOKER_HOME": str(tmp_path), "PATH": os.environ["PATH"]}))
    assert report.loader
    assert msgspec.to_builtins(report)["loader"]["reader"] == report.loader.reader
    console = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(report, console)
    assert report.loader.reader in console.export_text()
