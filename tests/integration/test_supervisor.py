"""The supervisor with small real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from stoker_cli import supervisor as module
from stoker_cli.process import Child
from stoker_cli.process import spawn as real_spawn
from stoker_cli.supervisor import Backoff, ProcessSpec, Supervisor
from stoker_core.clock import SystemClock
from stoker_core.errors import SetupFailed

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
# Says what it gets, and ends by itself.
POLITE = """
import signal, sys, time
def end(number, frame):
    open(sys.argv[1], "a").write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1] + "." + sys.argv[2], "w").close()
time.sleep(600)
"""


def process(name: str, code: str, *arguments: str, **options: object) -> ProcessSpec:
    spec = ProcessSpec(name=name, command=(sys.executable, "-c", code, *arguments), env=dict(os.environ))
    return replace(spec, **options)  # type: ignore[arg-type]


class Running:
    def __init__(self, supervisor: Supervisor, lines: list[str]) -> None:
        self.supervisor, self.lines = supervisor, lines
        self.stop, self.kill = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(supervisor.run(self.stop, self.kill))

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.02)

    async def new_pid(self, name: str, old: int | None = None) -> int:
        await self.until(lambda: self.supervisor.pid(name) not in (None, old))
        pid = self.supervisor.pid(name)
        assert pid is not None
        return pid

    async def end(self) -> None:
        self.stop.set()
        await self.task


@contextlib.asynccontextmanager
async def supervised(tmp_path: Path, *specs: ProcessSpec, first_s: float = 0.01) -> AsyncIterator[Running]:
    lines: list[str] = []
    supervisor = Supervisor(
        specs,
        logs=tmp_path / "logs",
        clock=SystemClock(),
        report=lines.append,
        backoff=lambda: Backoff(first_s=first_s, cap_s=0.1),
    )
    running = Running(supervisor, lines)
    try:
        yield running
    finally:
        running.stop.set()
        running.kill.set()
        await asyncio.wait({running.task})


async def test_a_process_that_dies_is_started_again_and_the_death_is_told(tmp_path: Path) -> None:
    async with supervised(tmp_path, process("one", SLEEP)) as running:
        first = await running.new_pid("one")
        os.kill(first, signal.SIGKILL)
        second = await running.new_pid("one", first)
        await running.until(lambda: "one is back" in running.lines)
        assert second != first
        assert running.lines[0] == "one killed by SIGKILL; starting it again in 0.01 s"
        await running.end()
        assert not psutil.pid_exists(second)


async def test_one_that_keeps_dying_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    flag = tmp_path / "broken"
    code = f"import os, time; print('because of this'); os.path.exists({str(flag)!r}) and exit(3); time.sleep(600)"
    async with supervised(tmp_path, process("one", code)) as running:
        first = await running.new_pid("one")
        running.supervisor.establish()
        flag.touch()
        os.kill(first, signal.SIGKILL)
        await running.until(lambda: any("because of this" in line for line in running.lines))
        assert any("exited with 3" in line for line in running.lines)


async def test_one_that_keeps_dying_from_the_start_ends_the_run_and_the_others(tmp_path: Path) -> None:
    never = process("bad", "print('no such thing'); exit(1)")
    async with supervised(tmp_path, process("good", SLEEP), never) as running:
        good = await running.new_pid("good")
        with pytest.raises(ExceptionGroup) as failed:
            await running.task
        (error,) = failed.value.exceptions
        assert isinstance(error, SetupFailed)
        assert "bad does not start (exited with 1)" in error.message
        assert "no such thing" in error.message
        assert not psutil.pid_exists(good)


async def test_refused_settings_are_not_tried_again(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    code = f"open({str(tries)!r}, 'a').write('x'); exit(2)"
    async with supervised(tmp_path, process("bad", code)) as running:
        with pytest.raises(ExceptionGroup):
            await running.task
    assert tries.read_text() == "x"


async def test_what_cannot_be_executed_is_named(tmp_path: Path) -> None:
    spec = replace(process("bad", ""), command=("/nowhere/program",))
    async with supervised(tmp_path, spec) as running:
        with pytest.raises(ExceptionGroup) as failed:
            await running.task
        assert "bad cannot be executed" in str(failed.value.exceptions[0])


async def test_a_process_waits_until_what_it_needs_is_ready(tmp_path: Path) -> None:
    open_, done = asyncio.Event(), []

    async def ready() -> bool:
        return open_.is_set()

    async def once() -> None:
        done.append("once")

    base = process("base", SLEEP, ready=ready, once_ready=once)
    async with supervised(tmp_path, process("user", SLEEP, after=("base",)), base) as running:
        await running.new_pid("base")
        await asyncio.sleep(0.3)
        assert running.supervisor.pid("user") is None
        open_.set()
        await running.new_pid("user")
        assert done == ["once"]


async def test_processes_stop_in_reverse_order(tmp_path: Path) -> None:
    order = tmp_path / "order"
    names = ("nats", "store", "gateway")
    specs = [
        process(name, POLITE, str(order), name, after=names[:1] if index else ()) for index, name in enumerate(names)
    ]
    async with supervised(tmp_path, *specs) as running:
        await running.until(lambda: all(Path(f"{order}.{name}").exists() for name in names))
        await running.end()
    assert order.read_text().split() == ["gateway", "store", "nats"]


async def test_one_that_ignores_the_stop_signal_is_killed_after_its_timeout(tmp_path: Path) -> None:
    up = tmp_path / "up"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(up)!r}, 'w'); time.sleep(600)"
    async with supervised(tmp_path, process("deaf", code, stop_timeout_s=0.2)) as running:
        await running.until(up.exists)
        pid = await running.new_pid("deaf")
        await running.end()
        assert not psutil.pid_exists(pid)
        assert running.lines[-1] == "deaf did not stop within 0.2 s and was killed"


async def test_kill_cuts_an_orderly_stop_short(tmp_path: Path) -> None:
    up = tmp_path / "up"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(up)!r}, 'w'); time.sleep(600)"
    async with supervised(tmp_path, process("deaf", code, stop_timeout_s=600)) as running:
        await running.until(up.exists)
        running.stop.set()
        await asyncio.sleep(0.1)
        assert not running.task.done()
        running.kill.set()
        await running.task


async def test_what_a_dead_process_left_in_its_group_goes_too(tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(note)!r} + ".tmp", "w").write(str(child.pid)); import os; os.rename({str(note)!r} + ".tmp", {str(note)!r})
time.sleep(600)
"""
    async with supervised(tmp_path, process("parent", code), first_s=5) as running:
        await running.until(note.exists)
        grandchild = int(note.read_text())
        os.kill(await running.new_pid("parent"), signal.SIGKILL)
        await running.until(lambda: not alive(grandchild))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    code = """
import asyncio, os, sys
from pathlib import Path
from stoker_cli.supervisor import ProcessSpec, Supervisor
from stoker_core.clock import SystemClock
async def main(folder):
    spec = lambda name: ProcessSpec(name=name, command=(sys.executable, "-c", "import time; time.sleep(600)"), env=dict(os.environ))
    supervisor = Supervisor([spec("a"), spec("b")], logs=folder / "logs", clock=SystemClock(), report=print)
    running = asyncio.ensure_future(supervisor.run(asyncio.Event(), asyncio.Event()))
    await supervisor.wait_ready()
    print(supervisor.pid("a"), supervisor.pid("b"), flush=True)
    await running
asyncio.run(main(Path(sys.argv[1])))
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    parent.send_signal(number)
    await parent.wait()
    async with asyncio.timeout(30):
        while any(map(alive, pids)):
            await asyncio.sleep(0.02)


async def test_logs_of_the_run_before_are_kept_aside(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "one.log"
    for text in ("first\n", "second\n"):
        code = f"import time; print({text.strip()!r}, flush=True); time.sleep(600)"
        async with supervised(tmp_path, process("one", code)) as running:
            while not (log.exists() and log.read_text() == text):
                await asyncio.sleep(0.02)
            await running.end()
    assert log.with_suffix(".log.1").read_text() == "first\n"


def alive(pid: int) -> bool:
    """A zombie that nobody has reaped yet does not count."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def test_once_the_system_works_a_process_that_cannot_be_forked_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0

    def spawn(*arguments: object, **options: object) -> Child:
        nonlocal refused
        if running.supervisor._established and refused < 2:
            refused += 1
            raise OSError(11, "Resource temporarily unavailable")
        return real_spawn(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "spawn", spawn)
    async with supervised(tmp_path, process("one", SLEEP), process("two", SLEEP)) as running:
        first, other = await running.new_pid("one"), await running.new_pid("two")
        running.supervisor.establish()
        os.kill(first, signal.SIGKILL)
        await running.new_pid("one", first)
        assert refused == 2
        assert any("one cannot be executed: [Errno 11]" in line for line in running.lines)
        assert running.supervisor.pid("two") == other
        await running.end()


async def test_a_disk_too_full_to_keep_an_old_log_does_not_end_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    monkeypatch.setattr(module, "LOG_BYTES_MAX", 1)
    monkeypatch.setattr(module, "LOG_CHECK_S", 0.01)
    code = "import time; print('more than a byte', flush=True); time.sleep(600)"
    async with supervised(tmp_path, process("one", code)) as running:
        await running.new_pid("one")
        await running.until(lambda: any("No space left" in line for line in running.lines))
        assert not running.task.done()
        await running.end()
