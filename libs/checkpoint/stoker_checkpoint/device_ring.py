"""A load on its way to a GPU: what the reading side copies of it, and its tensors on the side that uses them.

The reading side makes a `_native.DeviceRing`, starts a `_native.Feeder` with `spans_of` its plan, and passes two
descriptors: the ring's memory and the feeder's board. The other side attaches to these in any process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from stoker_checkpoint import _native
from stoker_checkpoint.header import TensorRef
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.plan import CHUNK_BYTES, ReadPlan
from stoker_checkpoint.pool_load import load_error
from stoker_checkpoint.tensors import torch_type
from stoker_core.errors import InvalidMessage, InvalidRequest, LoadCancelled, NativeUnavailable, StokerError

if TYPE_CHECKING:
    import torch

    Named = tuple[str, torch.Tensor]

_POLL_S = 0.1
_RESERVE_SLOTS = 2
"""Never lent: one is filled while the other is copied out of, whatever the consumer keeps."""


def spans_of(plan: ReadPlan) -> list[tuple[int, int]]:
    """For each position, offset and size of the part of its chunk that holds all that is read of it."""
    spans = [(CHUNK_BYTES, 0)] * len(plan.positions)
    for position, _, offset, size in plan.extents:
        begin = offset % CHUNK_BYTES
        first, length = spans[position]
        end = max(begin + size, first + length if length else 0)
        first = min(first, begin)
        spans[position] = first, end - first
    return spans


def ordinal_of(uuid: str) -> int:
    """The number, in this process, of the device that NVML knows as `uuid` ("GPU-…").

    Raises NativeUnavailable if CUDA sees none of that name here.
    """
    try:
        known = [_nvml_name(device) for device in _native.cuda_devices()]
    except RuntimeError as error:
        raise NativeUnavailable(str(error)) from error
    if uuid not in known:
        raise NativeUnavailable(f"CUDA sees no device {uuid}")
    return known.index(uuid)


def _nvml_name(uuid: bytes) -> str:
    text = uuid.hex()
    return "-".join(("GPU", text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


class Mark(Protocol):
    """A moment in a stream. `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether all work before it has ended."""

    def synchronize(self) -> None:
        """Wait for that."""


class DeviceMemory(Protocol):
    """What is done on the device, all of it in the order of one stream. Tensors are uint8 of one dimension."""

    def empty(self, size_bytes: int) -> torch.Tensor: ...
    def view(self, address: int, size_bytes: int, owner: object) -> torch.Tensor:
        """The memory at `address`. Its storage keeps `owner` alive."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None: ...
    def mark(self) -> Mark: ...


class CudaMemory:
    """The stream is the one that is current when this is made."""

    def __init__(self, device: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", device)
        self._stream = torch.cuda.current_stream(self._device)

    def empty(self, size_bytes: int) -> torch.Tensor:
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(size_bytes, dtype=self._torch.uint8, device=self._device)

    def view(self, address: int, size_bytes: int, owner: object) -> torch.Tensor:
        return self._torch.as_tensor(_CudaArray(address, size_bytes, owner), device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        return cast(Mark, self._stream.record_event())


class _CudaArray:
    """Source: Numba's CUDA array interface, version 2; torch keeps the object until the storage is gone."""

    def __init__(self, address: int, size_bytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def attach_ring(
    manifest: Manifest,
    plan: ReadPlan,
    ring_fd: int,
    board_fd: int,
    *,
    directory: Path,
    device: int,
    alive: Callable[[], bool] | None = None,
) -> DeviceCheckpoint:
    """Use a load that this or another process feeds into a ring, by the same plan.

    ring_fd, board_fd: stay the caller's.  device: the ring's, as numbered in this process.  directory: for messages.
    alive: whether who feeds is still there; asked every 100 ms while waiting.
    Raises InvalidMessage if the descriptors are not of such a load, NativeUnavailable if the CUDA driver refuses.
    """
    view = open_ring(ring_fd, board_fd, device)
    return DeviceCheckpoint(manifest, plan, view, CudaMemory(device), directory, alive=alive)


def open_ring(ring_fd: int, board_fd: int, device: int) -> _native.DeviceRingView:
    """Raises what `attach_ring` raises."""
    try:
        return _native.DeviceRingView(ring_fd, board_fd, device)
    except (ValueError, OSError) as error:
        raise InvalidMessage(f"the descriptors are not those of a ring: {error}") from error
    except RuntimeError as error:
        raise NativeUnavailable(f"the ring cannot be mapped: {error}") from error


class DeviceCheckpoint:
    """Tensors of a load that passes through a ring, each as soon as it is there. Made by `attach_ring`; used by one thread.

    Tensors are valid in the order of the memory's stream; whoever uses them on another stream orders that himself, as
    with any tensor of torch. They stay valid for as long as they are kept. One that lies whole in one slot is a view
    of it, and the slot is used again once all its tensors are gone and the stream has passed that moment. Other tensors
    own their memory: those that cross slots, those misaligned for their dtype, and all while few slots are left.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: ReadPlan,
        view: _native.DeviceRingView,
        memory: DeviceMemory,
        directory: Path,
        *,
        alive: Callable[[], bool] | None = None,
    ) -> None:
        """Raises InvalidMessage if the ring is not fed by a plan like this one."""
        if view.positions != len(plan.positions):
            raise InvalidMessage(f"the ring has {view.positions} positions, its plan {len(plan.positions)}")
        self._plan, self._view, self._memory, self._directory = plan, view, memory, directory
        self._alive = alive or (lambda: True)
        self._refs = [tensor for tensor in manifest.tensors if tensor.name in plan.offsets]
        self._begun = False
        self._position = -1  # of the slot `_slot`
        self._slot: _Slot | None = None
        self._lent_slots = 0  # with tensors that are alive
        self._ours = 0  # slots that were published and not freed
        self._dropped: deque[_Slot] = deque()  # one entry for each tensor that is gone; finalisers do nothing but add
        self._retired: deque[tuple[Mark, _Slot]] = deque()  # no longer used, from that mark on

    def tensors(self) -> Iterator[Named]:
        """(name, tensor) in the order of the files; once. Ends once the whole load was in the ring.

        Raises ReadFailed, CheckpointChanged, CorruptCheckpoint or LoadCancelled if the load ends early, NativeUnavailable
        if the device fails, RefusedCheckpoint for a dtype that torch does not have.
        """
        if self._begun:
            raise InvalidRequest("tensors pass through a ring once")
        self._begun = True
        for ref in self._refs:
            dtype, shape = torch_type(self._directory, ref)
            # The bytes are not named here: the generator must not keep alive what its consumer drops.
            yield ref.name, self._bytes_of(ref, dtype.itemsize).view(dtype).view(shape)
        while self._position < self._view.positions:
            self._advance()

    def _bytes_of(self, ref: TensorRef, align_bytes: int) -> torch.Tensor:
        if ref.size_bytes == 0:
            return self._memory.empty(0)
        position, within = divmod(self._plan.offsets[ref.name], CHUNK_BYTES)
        while self._position < position:
            self._advance()
        slot = self._current()
        if within + ref.size_bytes <= CHUNK_BYTES and self._may_lend(slot):
            address = self._view.address(slot.index) + within
            if address % align_bytes == 0:
                return self._lend(slot, address, ref.size_bytes)
        owned, done = self._memory.empty(ref.size_bytes), 0
        while True:
            size = min(ref.size_bytes - done, CHUNK_BYTES - within)
            address = self._view.address(self._current().index) + within
            self._memory.copy(owned[done : done + size], self._memory.view(address, size, self._view))
            done += size
            if done == ref.size_bytes:
                return owned
            self._advance()
            within = 0

    def _current(self) -> _Slot:
        assert self._slot is not None, "no position was waited for"
        return self._slot

    def _may_lend(self, slot: _Slot) -> bool:
        self._collect()
        return slot.tensors > 0 or self._lent_slots < self._view.slots - _RESERVE_SLOTS

    def _lend(self, slot: _Slot, address: int, size_bytes: int) -> torch.Tensor:
        if slot.tensors == 0:
            self._lent_slots += 1
        slot.tensors += 1
        return self._memory.view(address, size_bytes, _Loan(self._view, slot, self._dropped))

    def _advance(self) -> None:
        """Leave the current position for the next one, and wait until that is in the ring. After the last: only leave."""
        if self._slot is not None:
            self._slot.passed = True
            self._retire_if_unused(self._slot)
            self._slot = None
        self._position += 1
        if self._position == self._view.positions:
            return
        self._collect()
        while not self._view.wait(self._position, 0.0 if self._blocked() else _POLL_S):
            self._collect()
            if self._blocked():
                self._retired[0][0].synchronize()
            elif self._view.state != _native.LOADING and not self._view.wait(self._position, 0):
                raise self._error()
            elif not self._alive():
                raise LoadCancelled("the process that feeds the ring is gone")
        self._slot = _Slot(self._view.slot_of(self._position))
        self._ours += 1

    def _blocked(self) -> bool:
        """Whether the feeder has no slot left: then some are retired, as not all are ever lent."""
        return self._ours == self._view.slots

    def _collect(self) -> None:
        """Take back the loans of tensors that are gone, and free the slots that the stream has passed."""
        while self._dropped:
            slot = self._dropped.popleft()
            slot.tensors -= 1
            if slot.tensors == 0:
                self._lent_slots -= 1
                self._retire_if_unused(slot)
        while self._retired and self._retired[0][0].query():
            _, slot = self._retired.popleft()
            self._ours -= 1
            self._view.free(slot.index)

    def _retire_if_unused(self, slot: _Slot) -> None:
        if slot.passed and slot.tensors == 0:
            self._retired.append((self._memory.mark(), slot))

    def _error(self) -> StokerError:
        kind, _, _, result = self._view.failure()
        if kind == _native.DEVICE_ERROR:
            return NativeUnavailable(f"the CUDA driver failed with result {result} while the ring was fed")
        return load_error(cast(_native.Board, self._view), self._plan, self._directory)


class _Slot:
    """One position's stay in a slot.  tensors: lent and not known to be gone.  passed: no more will be lent."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.tensors = 0
        self.passed = False


class _Loan:
    """Kept alive by one tensor's storage: keeps the memory mapped, and tells when it is gone, from whatever thread."""

    def __init__(self, view: _native.DeviceRingView, slot: _Slot, dropped: deque[_Slot]) -> None:
        self._view, self._slot, self._dropped = view, slot, dropped

    def __del__(self) -> None:
        self._dropped.append(self._slot)
