from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from stoker_cli.supervisor import Backoff, ProcessSpec, cap, describe_exit, start_order


def spec(name: str, *after: str) -> ProcessSpec:
    return ProcessSpec(name=name, command=("true",), env={}, after=after)


def test_delays_double_up_to_the_cap() -> None:
    backoff = Backoff(first_s=0.2, cap_s=10.0)
    assert [backoff.after(0.0) for _ in range(8)] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])


def test_a_long_life_starts_the_delays_again() -> None:
    backoff = Backoff(first_s=0.2, cap_s=10.0, reset_after_s=30.0)
    for _ in range(5):
        backoff.after(1.0)
    assert backoff.after(30.0) == pytest.approx(0.2)
    assert backoff.after(29.0) == pytest.approx(0.4)


def test_endless_deaths_stay_at_the_cap() -> None:
    backoff = Backoff(deaths=10**6)
    assert backoff.after(0.0) == 10.0


def test_processes_start_after_what_they_need() -> None:
    order = start_order([spec("gateway", "nats", "postgres"), spec("postgres"), spec("nats")])
    assert [one.name for one in order] == ["postgres", "nats", "gateway"]


@pytest.mark.parametrize("specs", [[spec("a", "missing")], [spec("a", "b"), spec("b", "a")]])
def test_dependencies_that_cannot_be_met_are_refused(specs: list[ProcessSpec]) -> None:
    with pytest.raises(ValueError, match="dependencies cannot be met: a"):
        start_order(specs)


def test_exits_are_described() -> None:
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(3) == "exited with 3"
    assert describe_exit(-(signal.SIGRTMIN + 2)) == f"killed by signal {signal.SIGRTMIN + 2}"


def test_a_log_over_its_limit_is_moved_aside_under_its_writer(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100)
        cap(log, 100)
        assert log.stat().st_size == 100
        writer.write(b"y")
        cap(log, 100)
        writer.write(b"z")
    assert log.read_bytes() == b"z"
    assert (tmp_path / "one.log.1").read_bytes() == b"x" * 100 + b"y"


def test_a_full_disk_keeps_a_log_bounded_and_says_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    log = tmp_path / "one.log"
    log.write_bytes(b"x" * 101)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        cap(log, 100)
    assert log.read_bytes() == b""
