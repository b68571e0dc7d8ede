"""A load on the side that uses it: tensors as their chunks become ready, in any process."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from stoker_checkpoint import _native
from stoker_checkpoint.header import TensorRef, shown
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.plan import ALIGN_BYTES, CHUNK_BYTES, ReadPlan, aligned, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.pool_load import load_error
from stoker_checkpoint.reading import Reading
from stoker_checkpoint.tensors import torch_type
from stoker_core.errors import InvalidMessage, InvalidRequest, LoadCancelled, NativeUnavailable

if TYPE_CHECKING:
    import torch

    Named = tuple[str, torch.Tensor]
    Step = int | Named | Callable[[], object]

_POLL_S = 0.1
_COPY_INLINE_BYTES = 2**18
"""Copied in the event loop, in some 50 µs; handing it to a thread takes as long."""
_TENSORS_PER_TURN = 64
"""Made before the event loop gets a turn: about 0.3 ms."""


def load(
    manifest: Manifest,
    pool: Pool,
    directory: Path,
    *,
    names: Collection[str] | None = None,
    window_bytes: int = 0,
    verify: bool = False,
) -> LoadedCheckpoint:
    """Read the tensors called `names` (None: all) from `directory` into `pool`, and use them in this process.

    Returns at once. window_bytes: stream through so much of the pool (whole chunks, at least one); 0: all lies in it.
    Raises what `plan_reads` and `Pool.read` raise.
    """
    plan = plan_reads(manifest, names, whole_chunks=verify)
    window_chunks = max(1, window_bytes // CHUNK_BYTES) if window_bytes else 0
    reading = pool.read(plan, manifest, directory, window_chunks=window_chunks, verify=verify)
    try:
        return attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=directory, reading=reading)
    except BaseException:
        reading.close()
        raise


def attach(
    manifest: Manifest,
    plan: ReadPlan,
    pool_fd: int,
    board_fd: int,
    *,
    directory: Path,
    alive: Callable[[], bool] | None = None,
    reading: Reading | None = None,
) -> LoadedCheckpoint:
    """Use a load that this or another process reads by the same plan.

    pool_fd, board_fd: the reading's; stay the caller's.  directory: for messages.  alive: whether who reads is still
    there; asked every 100 ms while waiting.  reading: closed with the load.
    Raises InvalidMessage if the descriptors are not of such a load.
    """
    try:
        board = _native.Board.open(board_fd)
        _check_plan(manifest, plan, board.positions)
        view = _native.View(pool_fd, board.table[: board.window] if board.window else board.table)
    except (ValueError, OSError) as error:
        raise InvalidMessage(f"the descriptors are not those of a load: {error}") from error
    return LoadedCheckpoint(manifest, plan, board, view, directory, alive=alive or (lambda: True), reading=reading)


class LoadedCheckpoint:
    """Made by `load` and `attach`. Whoever waits for what never becomes ready gets ReadFailed, CheckpointChanged,
    CorruptCheckpoint or LoadCancelled.

    Tensors are views of a private mapping of the pool: writing to them changes neither the pool nor what others see.
    Those that outlive `close` get memory of their own there. Of a load through a window every tensor owns its memory;
    it can be taken once, in order.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: ReadPlan,
        board: _native.Board,
        view: _native.View,
        directory: Path,
        *,
        alive: Callable[[], bool],
        reading: Reading | None,
    ) -> None:
        self._plan, self._board, self._view, self._directory = plan, board, view, directory
        self._alive, self._reading = alive, reading
        self._memory = memoryview(view)
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors if tensor.name in plan.offsets}
        # Name → what a tensor's storage lies on. The storage alone keeps it alive, so this tells which tensors live.
        self._lent: weakref.WeakValueDictionary[str, memoryview] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._closed = self._taken = False
        self._released = 0  # positions; of a load through a window

    def tensors(self) -> Iterator[Named]:
        """(name, tensor) in the order of the files, each as soon as its chunks are ready.

        Ends once the whole load is ready, so that no failure goes unseen.
        """
        return self._run(self._steps())

    async def atensors(self) -> AsyncIterator[Named]:
        """As `tensors`; waits and long copies happen in threads."""
        made = 0
        for step in self._steps():
            if isinstance(step, tuple):
                yield step
                made += 1
                if made % _TENSORS_PER_TURN == 0:
                    await asyncio.sleep(0)
            elif isinstance(step, int):
                await self._until(step)
            else:
                await asyncio.to_thread(step)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, once it is ready. Raises InvalidRequest if it is not loaded, or the load goes through a window."""
        if self._board.window:
            raise InvalidRequest("from a load through a window, tensors can be taken in order only")
        if name not in self._tensors:
            raise InvalidRequest(f"the load has no tensor {shown(name)}", "name")
        return next(self._run(self._one(self._tensors[name])))[1]

    def touch(self) -> None:
        """Read one byte of every page that comes from the files, as soon as it is ready. Needs no torch."""
        self._take()
        view = self._view
        for position, _, offset, size in self._plan.extents:  # each position has at least one
            for step in self._passed(position):
                self._await(step)
            self._await(position)
            view.touch(self._at(position) + offset % CHUNK_BYTES, size)

    def wait(self, timeout_s: float) -> bool:
        """Whether the whole load is ready within that time."""
        deadline_s = time.monotonic() + timeout_s
        for position in range(self._board.positions):
            while not self._board.wait(position, max(0.0, min(_POLL_S, deadline_s - time.monotonic()))):
                self._check(position)
                if time.monotonic() >= deadline_s:
                    return False
        return True

    async def ready(self) -> None:
        """Until the whole load is ready."""
        for position in range(self._board.positions):
            await self._until(position)

    def close(self) -> None:
        """Give the tensors that live on memory of their own, and let go of the pool. Idempotent.

        Raises NativeUnavailable if there is no memory for them; then nothing is closed. Where the load was made by
        `load`, also what `Reading.close` raises.
        """
        with self._lock:
            if not self._closed:
                self._keep_lent()
                self._memory = memoryview(b"")
                del self._view
                self._closed = True
        if self._reading is not None:
            self._reading.close()

    async def aclose(self) -> None:
        """`close` in a thread. A caller who is cancelled does not stop it."""
        await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self.close)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    # What is to be done, without waiting for it: a position that must be ready before the next step, a copy that takes
    # long, a tensor. `_run` and `atensors` do it.

    def _steps(self) -> Iterator[Step]:
        self._take()
        if self._board.window:
            yield from self._streamed()
        else:
            for tensor in self._tensors.values():
                yield from self._one(tensor)
        yield from self._missing(range(self._board.positions))

    def _one(self, tensor: TensorRef) -> Iterator[Step]:
        import torch

        dtype, shape = torch_type(self._directory, tensor)
        if not tensor.size_bytes:
            yield tensor.name, torch.empty(shape, dtype=dtype)
            return
        yield from self._missing(self._positions(tensor))
        if self._plan.offsets[tensor.name] % dtype.itemsize == 0:
            yield tensor.name, torch.frombuffer(self._lend(tensor), dtype=dtype).view(shape)
            return
        data = torch.empty(tensor.size_bytes, dtype=torch.uint8)
        yield from _copied(data, torch.frombuffer(self._lend(tensor), dtype=torch.uint8))
        self._check_open()
        yield tensor.name, data.view(dtype).view(shape)

    def _streamed(self) -> Iterator[Step]:
        import torch

        window = torch.frombuffer(self._memory, dtype=torch.uint8)
        tensors = list(self._tensors.values())
        for tensor, needed_next in zip(tensors, self._needed_after(tensors), strict=True):
            dtype, shape = torch_type(self._directory, tensor)
            data = torch.empty(tensor.size_bytes, dtype=torch.uint8)
            offset = self._plan.offsets[tensor.name]
            at, end = offset, offset + tensor.size_bytes
            while at < end:
                position, within = divmod(at, CHUNK_BYTES)
                stop = min(end, (position + 1) * CHUNK_BYTES)
                yield from self._passed(position)
                yield from self._missing([position])
                begin = self._at(position) + within
                yield from _copied(data[at - offset : stop - offset], window[begin : begin + stop - at])
                self._check_open()
                self._check_alone()
                at = stop
                if at < end or position < needed_next:
                    yield from self._passed(position + 1)
            yield tensor.name, data.view(dtype).view(shape)
        yield from self._passed(self._board.positions)

    def _passed(self, position: int) -> Iterator[int]:
        """In a load through a window, release all positions below. Each has to be ready: the chunk of one that is released is read into at once."""
        while self._board.window and self._released < position:
            yield from self._missing([self._released])
            self._released += 1
            self._board.release(self._released)

    def _missing(self, positions: Iterable[int]) -> Iterator[int]:
        for position in positions:
            if not self._board.is_ready(position):
                yield position

    def _run(self, steps: Iterator[Step]) -> Iterator[Named]:
        for step in steps:
            if isinstance(step, tuple):
                yield step
            elif isinstance(step, int):
                self._await(step)
            else:
                step()

    def _await(self, position: int) -> None:
        while not self._board.wait(position, _POLL_S):
            self._check(position)

    async def _until(self, position: int) -> None:
        # In slices: of a caller who is cancelled, no thread waits on for long.
        while not self._board.is_ready(position):
            if not await asyncio.to_thread(self._board.wait, position, _POLL_S):
                self._check(position)

    def _check(self, position: int) -> None:
        """Raises unless `position` is ready or can still become so."""
        self._check_open()
        if self._board.state != _native.LOADING:
            if not self._board.is_ready(position):
                raise load_error(self._board, self._plan, self._directory)
        elif not self._alive() and not self._board.is_ready(position):
            raise LoadCancelled("the process that reads is gone")

    def _check_alone(self) -> None:
        """Of a load through a window: what was just copied was not released, and so overwritten, by somebody else."""
        if self._board.released != self._released:
            raise InvalidRequest("another consumer has taken from this load; through a window there can be one")

    def _check_open(self) -> None:
        if self._closed:
            raise LoadCancelled("the load was closed")

    def _take(self) -> None:
        self._check_open()
        if self._board.window and self._taken:
            raise InvalidRequest("a load through a window can be taken once")
        self._taken = True

    def _at(self, position: int) -> int:
        """Where the chunk of `position` begins in the view."""
        return (position % self._board.window if self._board.window else position) * CHUNK_BYTES

    def _positions(self, tensor: TensorRef) -> range:
        """Of a tensor that has bytes."""
        offset = self._plan.offsets[tensor.name]
        return range(offset // CHUNK_BYTES, (offset + tensor.size_bytes - 1) // CHUNK_BYTES + 1)

    def _needed_after(self, tensors: Sequence[TensorRef]) -> list[int]:
        """For each tensor, the first position that one after it needs."""
        needed = [self._board.positions]
        for tensor in reversed(tensors[1:]):
            needed.append(self._positions(tensor)[0] if tensor.size_bytes else needed[-1])
        return needed[::-1][: len(tensors)]

    def _lend(self, tensor: TensorRef) -> memoryview:
        with self._lock:
            self._check_open()
            memory = self._lent.get(tensor.name)
            if memory is None:
                offset = self._plan.offsets[tensor.name]
                memory = self._lent[tensor.name] = self._memory[offset : offset + tensor.size_bytes]
            return memory

    def _keep_lent(self) -> None:
        offsets = self._plan.offsets
        lent = dict(self._lent)  # alive from here on, so that no address is freed meanwhile
        ranges = sorted((offsets[name], offsets[name] + len(memory)) for name, memory in lent.items())
        try:
            for begin, end in _joined(ranges):
                self._view.privatise(begin, end - begin)
        except OSError as error:
            raise NativeUnavailable(f"no memory for tensors that outlive their load: {error}") from error


def _check_plan(manifest: Manifest, plan: ReadPlan, positions: int) -> None:
    if positions != len(plan.positions):
        raise ValueError(f"the load has {positions} positions, the plan {len(plan.positions)}")
    for tensor in manifest.tensors:
        offset = plan.offsets.get(tensor.name)
        if offset is not None and not 0 <= offset <= positions * CHUNK_BYTES - tensor.size_bytes:
            raise ValueError(f"the plan puts tensor {shown(tensor.name)} outside of the load")


def _copied(into: torch.Tensor, source: torch.Tensor) -> Iterator[Step]:
    if len(source) <= _COPY_INLINE_BYTES:
        into.copy_(source)
    else:
        yield partial(into.copy_, source)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending ranges as whole pages, those that meet in one."""
    begin = end = 0
    for next_begin, next_end in ranges:
        next_begin -= next_begin % ALIGN_BYTES
        next_end = aligned(next_end)
        if next_begin <= end:
            end = max(end, next_end)
            continue
        if begin < end:
            yield begin, end
        begin, end = next_begin, next_end
    if begin < end:
        yield begin, end
