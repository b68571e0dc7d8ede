"""The contestants of `stoker bench load --device cuda`: every tensor ends on the first GPU, and is kept there."""

from __future__ import annotations

from typing import Any

from stoker_cli.bench.load_contestants import (
    CHILDREN,
    Contestant,
    FastSafetensors,
    Job,
    RunAi,
    Stoker,
    Tensors,
    import_torch,
)

DEVICE = 0
RING_SLOTS = 16  # of 16 MiB
COPY_BYTES = 256 * 2**20


def start_cuda() -> None:
    """The context, and the first copy of a process, are not timed."""
    import torch

    import_torch()
    torch.zeros(1).to(f"cuda:{DEVICE}")
    torch.cuda.synchronize()


class Memcpy:
    """The bytes of the checkpoint from pinned memory, by cudaMemcpyAsync: what the way to the GPU can do."""

    def __init__(self, job: Job) -> None:
        self._total_bytes = job.total_bytes

    def prepare(self) -> None:
        import torch

        start_cuda()
        self._source = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
        self._target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
        self._wait = torch.cuda.synchronize

    def load(self) -> Tensors:
        for done in range(0, self._total_bytes, COPY_BYTES):
            size = min(COPY_BYTES, self._total_bytes - done)
            self._target[:size].copy_(self._source[:size], non_blocking=True)
        self._wait()
        return {}


class StokerCuda(Stoker):
    """From the disk through the registered pool and the ring; load_from_pool() when it lies in the pool already.

    Every tensor is copied out of the ring, as an engine copies it into its parameters.
    """

    def prepare(self) -> None:
        from stoker_checkpoint import _native
        from stoker_checkpoint.device_ring import attach_ring, spans_of
        from stoker_core.errors import SetupFailed

        start_cuda()
        super().prepare()
        _, refused = _native.cuda_pinned()
        if refused:
            raise SetupFailed(f"the pool is not registered with CUDA: {refused}")
        self._attach_ring, self._spans, self._feeder = attach_ring, spans_of, _native.Feeder
        self._ring = _native.DeviceRing(DEVICE, RING_SLOTS)

    def load(self) -> Tensors:
        manifest = self._open_checkpoint(self._directory)
        plan = self._plan(manifest)
        self._reading = self._pool.read(plan, manifest, self._directory)
        self._loads.callback(self._reading.close)
        return self._feed(manifest, plan)

    def load_from_pool(self) -> Tensors:
        manifest = self._open_checkpoint(self._directory)
        return self._feed(manifest, self._plan(manifest))

    def _feed(self, manifest: Any, plan: Any) -> Tensors:
        import torch

        from stoker_checkpoint import _native

        board = _native.Board.open(self._reading.board_fd)
        feeder = self._feeder(self._ring, board, self._pool.native, self._spans(plan))
        loaded = self._attach_ring(
            manifest, plan, self._ring.fileno(), feeder.board_fd, directory=self._directory, device=DEVICE
        )
        tensors = {name: tensor.clone() for name, tensor in loaded.tensors()}
        torch.cuda.synchronize()
        feeder.join(60.0)
        return tensors


class FastSafetensorsCuda(FastSafetensors):
    """Without GPUDirect Storage, which needs a driver and a file system of its own."""

    device = f"cuda:{DEVICE}"

    def prepare(self) -> None:
        start_cuda()
        super().prepare()

    def load(self) -> Tensors:
        return synchronized(super().load())


class RunAiCuda(RunAi):
    device = f"cuda:{DEVICE}"

    def prepare(self) -> None:
        start_cuda()
        super().prepare()

    def load(self) -> Tensors:
        return synchronized(super().load())


class InstantTensor:
    """As vLLM uses it: tensors that own their memory."""

    def __init__(self, job: Job) -> None:
        self._files = list(job.files)

    def prepare(self) -> None:
        from instanttensor import safe_open

        start_cuda()
        self._open = safe_open

    def load(self) -> Tensors:
        with self._open(self._files, framework="pt", device=DEVICE, process_group=None, copy=True) as opened:
            return synchronized(dict(opened.tensors()))


def synchronized(tensors: Tensors) -> Tensors:
    """What was only asked of the device counts once it is there."""
    import torch

    torch.cuda.synchronize()
    return tensors


CUDA_CHILDREN: dict[str, type[Contestant]] = {
    "sequential": CHILDREN["sequential"],
    "memcpy": Memcpy,
    "stoker": StokerCuda,
    "runai": RunAiCuda,
    "fastsafetensors": FastSafetensorsCuda,
    "instanttensor": InstantTensor,
}
