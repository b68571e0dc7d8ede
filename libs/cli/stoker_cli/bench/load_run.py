"""Rounds of `stoker bench load`: a child is prepared, the machine rests, the page cache is dropped, one contestant runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from stoker_checkpoint.plan import CHUNK_BYTES
from stoker_cli.bench import page_cache
from stoker_cli.bench.load_child import MESSAGE_BYTES_MAX
from stoker_cli.bench.load_contestants import PACKAGES, Job, installed
from stoker_cli.bench.load_figures import Round, balanced
from stoker_cli.bench.make_checkpoint import Checkpoint
from stoker_cli.process import tail
from stoker_core.errors import SetupFailed

CONTESTANTS = {
    "cpu": ("fio", "sequential", "stoker", "runai", "safetensors", "safetensors_mapped", "fastsafetensors", "torch"),
    "cuda": ("fio", "sequential", "stoker", "memcpy", "runai", "fastsafetensors", "instanttensor"),
}
"""By device, in the order of the first round."""
LOAD_NO_TENSORS = ("sequential", "memcpy")
PREPARE_TIMEOUT_S = 900.0
LOAD_TIMEOUT_S = 900.0
END_TIMEOUT_S = 30.0
SAMPLE_S = 0.005
REST_S = 5.0
"""Usual before each measurement: a disk may have a burst to give, and a virtual machine's host takes free memory back in seconds."""
CACHED_MAX = 0.02
DROPS = 5
DROP_PAUSE_S = 0.2
SHARED_OF_CHILD_BYTES = 500_000_000  # of a prepared child: torch and what it imports


class Child:
    """What is measured, in a process of its own. Ended, whatever it does, on leaving the context."""

    def __init__(self, name: str, module: str, job: msgspec.Struct, log: Path) -> None:
        """module: of stoker_cli.bench; it takes a socket's descriptor and `job` as JSON, as load_child does."""
        self._name, self._log = name, log
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", f"stoker_cli.bench.{module}", str(theirs.fileno())]
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, msgspec.json.encode(job).decode()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes also who waits for an answer in another thread
        self._socket.close()  # it ends by itself when it notices
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_ready(self) -> None:
        self._answer(PREPARE_TIMEOUT_S)

    def call(self, name: str, descriptors: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises SetupFailed if the child dies or takes too long."""
        socket.send_fds(self._socket, [json.dumps({"call": name, **arguments}).encode()], list(descriptors))
        return self._answer(PREPARE_TIMEOUT_S)[0]

    def borrow(self, name: str) -> list[int]:
        """Ask for descriptors; the caller closes them."""
        socket.send_fds(self._socket, [json.dumps({"call": name}).encode()], [])
        return self._answer(PREPARE_TIMEOUT_S)[1]

    def measure(self, name: str) -> tuple[dict[str, Any], float]:
        """Ask, and watch the child's own memory until it answers: also the MiB by which it grew at its peak."""
        before = own_bytes(self._process.pid)
        peak = before
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        socket.send_fds(self._socket, [json.dumps({"call": name}).encode()], [])
        self._socket.settimeout(SAMPLE_S)
        while True:
            peak = max(peak, own_bytes(self._process.pid))
            try:
                answer, _ = self._receive()
            except TimeoutError:
                if time.monotonic() > deadline_s:
                    raise self._failed(f"no answer within {LOAD_TIMEOUT_S:g} s") from None
                continue
            return answer, (max(peak, own_bytes(self._process.pid)) - before) / 2**20

    def _answer(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        self._socket.settimeout(timeout_s)
        try:
            return self._receive()
        except TimeoutError:
            raise self._failed(f"no answer within {timeout_s:g} s") from None

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        message, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, 2)
        if not message:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)  # until then its last words may not be written
            raise self._failed("it ended")
        return json.loads(message), descriptors

    def _failed(self, what: str) -> SetupFailed:
        return SetupFailed(f"{self._name}: {what}: {'; '.join(tail(self._log)) or 'it said nothing'}")


class Bench:
    """One checkpoint and the contestants that are to load it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Sequence[str],
        *,
        device: str,
        pool_bytes: int,
        together: bool,
        logs: Path,
        say: Callable[[str], None],
        rest_s: float = REST_S,
    ) -> None:
        """together: one contestant right after the other, in memory that the one before gave back; else each alone, after a rest."""
        self._rest_s = rest_s
        self._checkpoint, self._names, self._device, self._pool_bytes = checkpoint, names, device, pool_bytes
        self._together, self._logs, self._say = together, logs, say

    def run(self, rounds: int, *, verify: bool) -> list[Round]:
        """Measure everyone `rounds` times, in rotating order.

        verify: compare everyone's tensors with the record, in the first round, not timed.
        Raises SetupFailed if a contestant fails, yields wrong tensors, or the page cache cannot be dropped.
        """
        measured = []
        for number in range(rounds):
            self._say(f"round {number + 1} of {rounds}: {', '.join(balanced(self._names, number))}")
            one = self._round(number, verify=verify and number == 0)
            self._say(
                f"round {number + 1} of {rounds}: "
                + ", ".join(f"{name[:-2]} {value:.3f} s" for name, value in one.items() if name.endswith("_s"))
            )
            measured.append(one)
        return measured

    def _round(self, number: int, *, verify: bool) -> Round:
        found: Round = {}
        order = balanced(self._names, number)
        groups = [order] if self._together else [[name] for name in order]
        for group in groups:
            with ExitStack() as stack:
                rested_s = time.monotonic() + self._rest_s
                children = {name: stack.enter_context(self._child(name)) for name in self._processes(group)}
                for child in children.values():
                    child.wait_ready()
                time.sleep(max(0.0, rested_s - time.monotonic()))
                for name in group:
                    found |= self._measured(name, children, verify=verify)
        return found

    def _measured(self, name: str, children: dict[str, Child], *, verify: bool) -> Round:
        if name == "fio":
            self._make_cold()
            return {"fio_s": fio_s(self._checkpoint)}
        child = children.pop(name)
        found = self._cold(name, "load", child, verify=verify)
        if name == "stoker" and self._device == "cuda":
            answer, _ = child.measure("load_from_pool")
            found |= {"pool_s": answer["seconds"], "pool_ready_ms": answer["seconds"] * 1e3}
        elif name == "stoker":
            found |= self._from_pool(child, consumer := children.pop("pool"), verify=verify)
            consumer.__exit__()
            child.call("prepare_verified")
            found |= self._cold("verified", "load_verified", child, verify=verify)
        child.__exit__()  # what it keeps must not weigh on the next
        return found

    def _processes(self, names: Sequence[str]) -> list[str]:
        own = [name for name in names if name != "fio"]
        return [*own, "pool"] if "stoker" in own and self._device == "cpu" else own

    def _child(self, name: str) -> Child:
        job = Job(
            contestant=name,
            device=self._device,
            directory=str(self._checkpoint.directory),
            files=tuple(map(str, self._checkpoint.files)),
            pickles=tuple(map(str, self._checkpoint.pickles)),
            total_bytes=self._checkpoint.total_bytes,
            pool_bytes=self._pool_bytes,
        )
        return Child(name, "load_child", job, self._logs / f"{name}.log")

    def _cold(self, name: str, load: str, child: Child, *, verify: bool) -> Round:
        self._make_cold()
        answer, memory_mib = child.measure(load)
        cached = page_cache.cached_bytes([*self._checkpoint.files, *self._checkpoint.pickles])
        if verify and name not in LOAD_NO_TENSORS:
            self._check(name, child)
        return {
            f"{name}_s": answer["seconds"],
            f"{name}_memory_mib": memory_mib,
            f"{name}_page_cache_mib": cached / 2**20,
        }

    def _from_pool(self, owner: Child, consumer: Child, *, verify: bool) -> Round:
        descriptors = owner.borrow("lend")
        try:
            consumer.call("borrow", descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)
        answer, memory_mib = consumer.measure("load")
        parts = {f"pool_{part}": value for part, value in answer.items() if part != "seconds"}
        found = {"pool_s": answer["seconds"], "pool_ready_ms": answer["seconds"] * 1e3, "pool_memory_mib": memory_mib}
        if verify:
            found["pool_verify_ms"] = self._check("pool", consumer) * 1e3
        return found | parts

    def _check(self, name: str, child: Child) -> float:
        """Seconds to compare every tensor with the record. Raises SetupFailed if one differs."""
        answer = child.call("check", record=str(self._checkpoint.record))
        if answer["count"]:
            raise SetupFailed(f"{name} yields wrong bytes in {answer['count']} tensors: {', '.join(answer['wrong'])} …")
        return float(answer["seconds"])

    def _make_cold(self) -> None:
        """Raises SetupFailed if more than CACHED_MAX of the files stays in the page cache."""
        files = [*self._checkpoint.files, *self._checkpoint.pickles]
        total = sum(file.stat().st_size for file in files)
        for _ in range(DROPS):
            page_cache.drop(files)
            cached = page_cache.cached_bytes(files) / total
            if cached <= CACHED_MAX:
                return
            time.sleep(DROP_PAUSE_S)  # a process that used them may be ending
        raise SetupFailed(
            f"{cached:.0%} of {self._checkpoint.directory} stays in the page cache, so nothing would be cold; "
            "its files must belong to you, and no other process may use them"
        )


def choose(only: Sequence[str], device: str) -> tuple[list[str], list[str]]:
    """The contestants that can run of those wanted (none: all), and a line about each that cannot.

    Raises SetupFailed for a name that there is not, or if nobody is left.
    """
    there_are = CONTESTANTS[device]
    unknown = [name for name in only if name not in there_are]
    if unknown:
        raise SetupFailed(f"--only {unknown[0]}: there are {', '.join(there_are)}")
    names, missing = [], []
    for name in there_are:
        if only and name not in only:
            continue
        distribution, how = PACKAGES.get(name, ("", ""))
        if name == "fio" and not shutil.which("fio"):
            missing.append("fio is left out; it is not installed: apt install fio")
        elif distribution and not installed(distribution):
            missing.append(f"{name} is left out; it is not installed: {how}")
        else:
            names.append(name)
    if not names:
        raise SetupFailed("; ".join(missing))
    return names, missing


def pool_bytes(checkpoint: Checkpoint, asked_gb: float | None) -> int:
    """Of a pool that holds it: whole chunks of every file, or what was asked for. Raises SetupFailed if that is less."""
    need = sum(-(-file.stat().st_size // CHUNK_BYTES) * CHUNK_BYTES for file in checkpoint.files)
    if asked_gb is None:
        return need
    if asked_gb * 1e9 < need:
        raise SetupFailed(
            f"--pool-gb {asked_gb:g} is too small: the checkpoint needs {need / 1e9:.3f} GB of whole chunks"
        )
    return round(asked_gb * 1e9)


def need_device(device: str) -> None:
    """Raises SetupFailed, saying why, if tensors cannot be put there."""
    if device == "cpu":
        return
    if device != "cuda":
        raise SetupFailed(f"--device {device}: there are cpu and cuda")
    import torch

    from stoker_checkpoint import _native

    usable, reason = _native.cuda_available()
    if not usable:
        raise SetupFailed(f"--device cuda: {reason}")
    if not torch.cuda.is_available():
        raise SetupFailed("--device cuda: torch was built without CUDA")


def need_memory(file_bytes: int, pool: int, names: Sequence[str]) -> None:
    """Raises SetupFailed if memory is too small for the pool and one more copy of the tensors beside it."""
    others = [name for name in names if name not in ("fio", "sequential", "memcpy", "stoker")]
    need = (
        pool * ("stoker" in names) + (file_bytes * 5 // 4 if others else 0) + SHARED_OF_CHILD_BYTES * (1 + len(names))
    )
    available = _meminfo_bytes("MemAvailable")
    if available < need:
        raise SetupFailed(
            f"{need / 1e9:.1f} GB of memory are needed, {available / 1e9:.1f} GB are free; "
            "choose a smaller --gb, or fewer contestants with --only"
        )


def own_bytes(pid: int) -> int:
    """Memory that process `pid` has for itself: anonymous pages and page tables. A pool is shared memory, so not in it."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmPTE") if name in fields)


def fio_s(checkpoint: Checkpoint) -> float:
    """Seconds in which fio would read the shards: it leaves out the last part of each that fills no block.

    Raises SetupFailed with what fio says.
    """
    files = ":".join(str(file).replace(":", r"\:") for file in checkpoint.files)
    done = subprocess.run(
        [
            *("fio", "--name=device", f"--filename={files}", "--rw=read", "--bs=1M", "--direct=1", "--readonly"),
            *("--ioengine=libaio", "--iodepth=32", "--file_service_type=sequential", "--output-format=json"),
        ],
        capture_output=True,
        text=True,
        timeout=LOAD_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise SetupFailed(f"fio failed: {(done.stderr or done.stdout).strip()[-500:]}")
    read = json.loads(done.stdout)["jobs"][0]["read"]
    if not read["io_bytes"]:
        raise SetupFailed("the files are too small for fio; leave it out with --only")
    return float(checkpoint.total_bytes / (read["io_bytes"] / (read["runtime"] / 1e3)))


def _meminfo_bytes(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise SetupFailed(f"/proc/meminfo has no {name}")
