"""However `stoker up` ends, nothing of it is left."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from tests.support.services import alive, eventually
from tests.support.stack import Stack

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def small_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Without the demo model and vLLM: it is ready within moments."""
    stack = Stack.__new__(Stack)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    Stack.__init__(stack, tmp_path / "home", tmp_path / "up.log", "--no-demo")
    stack.wait_ready()
    return stack


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_everything_in_order_and_the_home_starts_again(small_stack: Stack, number: int):
    processes = small_stack.descendants()
    assert len(processes) > 6
    assert small_stack.stop(number) == 0
    assert not [p for p in processes if alive(p.pid)]
    again = Stack(small_stack.home, small_stack.log, "--no-demo")
    again.wait_ready()
    assert again.stop() == 0


async def test_kill_9_of_the_supervisor_leaves_no_process(small_stack: Stack):
    processes = small_stack.descendants()
    small_stack.stop(signal.SIGKILL)
    await eventually(
        lambda: not [p for p in processes if alive(p.pid)],
        timeout_s=20,
        what=f"all gone; left: {[p.name() for p in processes if psutil.pid_exists(p.pid)]}",
    )
    again = Stack(small_stack.home, small_stack.log, "--no-demo")
    again.wait_ready()
    assert again.stop() == 0
