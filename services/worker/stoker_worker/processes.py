"""Processes that must not outlive their parent: death signals, start times, leftovers."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from pathlib import Path

from stoker_core.logging import get_logger

log = get_logger("processes")

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies; exit now if it is dead already.

    Source: prctl(2), PR_SET_PDEATHSIG: bound to the thread that forked, so parents fork from their main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def set_name(name: str) -> None:
    """What `ps` and `top` show for this process; at most 15 bytes."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its pid, who it is. None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name may hold spaces and parentheses: fields are counted from its end. Source: proc(5), field 22.
    return int(stat.rpartition(")")[2].split()[19])


def signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals have a number only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class PidFiles:
    """One file for each process of a worker, so that a restarted worker finds what a killed one left.

    A full disk costs no instance: without its file a process still dies with its parent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, pid: int) -> None:
        try:
            (self._directory / name).write_text(f"{pid} {start_ticks(pid)}")
        except OSError as error:
            log.error("pid_file_not_written", name=name, pid=pid, error=str(error))

    def remove(self, name: str) -> None:
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            log.error("pid_file_not_removed", name=name, error=str(error))

    def end_leftovers(self, *, timeout_s: float) -> int:
        """Kill every recorded process that still runs and wait until it is gone; returns how many there were.

        Raises TimeoutError if one does not end in time: its memory is still held.
        """
        ended = 0
        for file in sorted(self._directory.iterdir()):
            pid_text, _, ticks = file.read_text().partition(" ")
            if pid_text and str(start_ticks(int(pid_text))) == ticks:
                ended += _kill_and_wait(int(pid_text), timeout_s)
            file.unlink()
        return ended


def _kill_and_wait(pid: int, timeout_s: float) -> int:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        readable, _, _ = select.select([handle], [], [], timeout_s)
        if not readable:
            raise TimeoutError(f"process {pid} does not end")
    except ProcessLookupError:
        return 0
    finally:
        os.close(handle)
    return 1
