"""A stand-in for libcuda whose device memory is memory of this machine: for tests of the way to a GPU where there is none.

What needs it runs in processes of its own, where LD_LIBRARY_PATH leads the loader to it.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_checkpoint import _native

SOURCE = Path(__file__).parents[2] / "libs/checkpoint/csrc/tests/fake_cuda.cpp"
BUILD_S = 100
UUIDS = ("GPU-40404040-4040-4040-4040-404040404040", "GPU-41414141-4141-4141-4141-414141414141")
"""Of its devices, by ordinal."""

Submit = Callable[..., "Future[Any]"]


@contextmanager
def processes(folder: Path) -> Iterator[Callable[[], Submit]]:
    """Makes processes that find the stand-in, which is built in `folder`; each runs what is submitted to it, in order."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-std=c++20", "-O1", "-fPIC", "-shared", SOURCE, "-o", library], check=True, timeout=BUILD_S)
    made: list[ProcessPoolExecutor] = []

    def make() -> Submit:
        made.append(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        return made[-1].submit

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(folder))
        yield make
    for process in made:
        process.shutdown(cancel_futures=True)


def fake_cuda() -> ctypes.CDLL:
    """In such a process: fake_cuda_live(), fake_cuda_registered() and fake_cuda_fail()."""
    return ctypes.CDLL("libcuda.so.1")


class StandInMemory:
    """The stand-in's device memory is this process's own. One stream, which lags: what is asked of it happens when
    somebody waits for it, or asks and is lucky. It does not keep tensors alive."""

    def __init__(self, seed: int = 0, luck: float = 0.3) -> None:
        self._random, self._luck = random.Random(seed), luck
        self._queue: deque[tuple[int, int, int]] = deque()
        self._asked = self.done = 0
        self._owned: list[torch.Tensor] = []
        self.lent: list[int] = []  # addresses

    def empty(self, size_bytes: int) -> torch.Tensor:
        # Kept, as the allocator of a real stream gives no memory away that the stream still uses.
        self._owned.append(torch.full((size_bytes,), 0xEE, dtype=torch.uint8))
        return self._owned[-1]

    def view(self, address: int, size_bytes: int, owner: object) -> torch.Tensor:
        array = (ctypes.c_ubyte * size_bytes).from_address(address)
        array.owner = owner  # type: ignore[attr-defined]
        if not isinstance(owner, _native.DeviceRingView):
            self.lent.append(address)
        return torch.frombuffer(array, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._queue.append((target.data_ptr(), source.data_ptr(), source.nbytes))
        self._asked += 1

    def mark(self) -> StandInMark:
        return StandInMark(self, self._asked)

    def is_lucky(self) -> bool:
        return self._random.random() < self._luck

    def run(self, until: int) -> None:
        while self.done < until:
            ctypes.memmove(*self._queue.popleft())
            self.done += 1


class StandInMark:
    def __init__(self, memory: StandInMemory, until: int) -> None:
        self._memory, self._until = memory, until

    def query(self) -> bool:
        if self._memory.is_lucky():
            self.synchronize()
        return self._memory.done >= self._until

    def synchronize(self) -> None:
        self._memory.run(self._until)


def same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also where bytes make no number."""
    if (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(tensor.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
