"""The ways to load a checkpoint that `stoker bench load` compares. Each runs in a process of its own.

What counts for all: the time from the call until every tensor is usable and kept, in memory that is the process's own or
the pool's. What only maps files has to copy its tensors for that: pages of the page cache are the kernel's, to drop under
pressure. safetensors is measured without the copy as well, by one read of every page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import msgspec

BLOCK_BYTES = 16 * 2**20  # of the sequential read
PAGE_BYTES = 4096
WARM_TIMEOUT_S = 600.0

Tensors = Mapping[str, Any]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a child loads. pickles: the same tensors for torch.load.  pool_bytes: of Stoker's pool."""

    contestant: str
    device: str  # cpu | cuda
    directory: str
    files: tuple[str, ...]
    pickles: tuple[str, ...]
    total_bytes: int
    pool_bytes: int


class Contestant(Protocol):
    """prepare() is not timed: imports, and what a running system has ready. load() is."""

    def __init__(self, job: Job) -> None: ...
    def prepare(self) -> None: ...
    def load(self) -> Tensors: ...


class SequentialRead:
    """The raw device: O_DIRECT, one block after the other. Yields no tensors."""

    def __init__(self, job: Job) -> None:
        self._files = [(file, Path(file).stat().st_size) for file in job.files]

    def prepare(self) -> None:
        from stoker_checkpoint import _native

        self._read = _native.sequential_read

    def load(self) -> Tensors:
        for file, size in self._files:
            self._read(file, size, block_bytes=BLOCK_BYTES)
        return {}


class TorchLoad:
    """torch.load of the pickled twin, not mapped."""

    def __init__(self, job: Job) -> None:
        self._files = job.pickles

    def prepare(self) -> None:
        import torch

        import_torch()
        self._load = torch.load

    def load(self) -> Tensors:
        tensors: dict[str, Any] = {}
        for file in self._files:
            tensors |= self._load(file, map_location="cpu", weights_only=True, mmap=False)
        return tensors


class Safetensors:
    """safetensors' own reader, which maps the files; its tensors are cloned to be kept."""

    def __init__(self, job: Job) -> None:
        self._files = job.files

    def prepare(self) -> None:
        from safetensors import safe_open

        import_torch()
        self._open = safe_open

    def load(self) -> Tensors:
        tensors: dict[str, Any] = {}
        for file in self._files:
            with self._open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    tensors[name] = self._keep(opened.get_tensor(name))
        return tensors

    def _keep(self, tensor: Any) -> Any:
        return tensor.clone()


class MappedSafetensors(Safetensors):
    """The same, but its tensors stay in the page cache: every page is read once."""

    def _keep(self, tensor: Any) -> Any:
        read_pages(tensor)
        return tensor


class FastSafetensors:
    """fastsafetensors by plain reads; its tensors lie in its buffers, which are kept."""

    device = "cpu"

    def __init__(self, job: Job) -> None:
        self._files = list(job.files)

    def prepare(self) -> None:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        import_torch()
        self._loader = SafeTensorsFileLoader(SingleGroup(), device=self.device, nogds=True)

    def load(self) -> Tensors:
        self._loader.add_filenames({0: self._files})
        self._buffers = self._loader.copy_files_to_device()
        return {name: self._buffers.get_tensor(name) for name in self._loader.get_keys()}


class RunAi:
    """run:ai's model streamer as it comes; the tensors that it yields belong to the caller (owned, its default)."""

    device = "cpu"

    def __init__(self, job: Job) -> None:
        self._files = list(job.files)
        self._open = ExitStack()

    def prepare(self) -> None:
        from runai_model_streamer import SafetensorsStreamer

        import_torch()
        self._streamer = self._open.enter_context(SafetensorsStreamer())

    def load(self) -> Tensors:
        self._streamer.stream_files(self._files, device=self.device)
        return dict(self._streamer.get_tensors())


class Stoker:
    """From the disk into a pool that is warm, as a node's is; reader and consumer are this one process.

    load() opens the checkpoint, reads it, and takes each tensor as it becomes ready, reading each of its pages once.
    """

    def __init__(self, job: Job) -> None:
        self._directory = Path(job.directory)
        self._pool_bytes, self._register_cuda = job.pool_bytes, job.device == "cuda"
        self._loads = ExitStack()

    def prepare(self) -> None:
        from stoker_checkpoint.load import attach
        from stoker_checkpoint.open import open_checkpoint
        from stoker_checkpoint.plan import plan_reads
        from stoker_checkpoint.pool import Pool
        from stoker_core.errors import SetupFailed

        import_torch()
        self._attach, self._open_checkpoint, self._plan = attach, open_checkpoint, plan_reads
        self._pool = Pool(self._pool_bytes, register_cuda=self._register_cuda)
        if not self._pool.wait_warm(WARM_TIMEOUT_S):
            raise SetupFailed(f"the pool was not warm within {WARM_TIMEOUT_S:g} s")

    def load(self) -> Tensors:
        return self._read(self._open_checkpoint(self._directory), verify=False)

    def prepare_verified(self) -> None:
        """Give the chunks back, and know every chunk's digest, as a node knows those of a registered model."""
        from stoker_checkpoint.digests import digest_manifest

        self._loads.close()
        self._manifest = digest_manifest(self._open_checkpoint(self._directory), self._directory)

    def load_verified(self) -> Tensors:
        """The same with every chunk checked against its digest before its tensors are handed out."""
        return self._read(self._manifest, verify=True)

    def lend(self) -> list[int]:
        """Descriptors for a consumer in another process: the pool and the board of the last load."""
        return [self._reading.pool_fd, self._reading.board_fd]

    def _read(self, manifest: Any, *, verify: bool) -> Tensors:
        plan = self._plan(manifest)
        self._reading = reading = self._pool.read(plan, manifest, self._directory, verify=verify)
        self._loads.callback(reading.close)
        loaded = self._attach(manifest, plan, reading.pool_fd, reading.board_fd, directory=self._directory)
        self._loads.enter_context(loaded)
        tensors: dict[str, Any] = {}
        for name, tensor in loaded.tensors():
            tensors[name] = tensor
            read_pages(tensor)
        reading.wait_blocking(WARM_TIMEOUT_S)
        return tensors


class StokerPool:
    """A consumer that finds the model in the pool of another process. parts: where the time went, in ms."""

    def __init__(self, job: Job) -> None:
        self._directory = Path(job.directory)
        self._loads = ExitStack()
        self.parts: dict[str, float] = {}

    def prepare(self) -> None:
        from stoker_checkpoint.load import attach
        from stoker_checkpoint.open import open_checkpoint
        from stoker_checkpoint.plan import plan_reads

        import_torch()
        self._attach, self._open_checkpoint, self._plan = attach, open_checkpoint, plan_reads

    def borrow(self, descriptors: Sequence[int]) -> None:
        self._pool_fd, self._board_fd = descriptors

    def load(self) -> Tensors:
        with self._part("open_ms"):
            manifest = self._open_checkpoint(self._directory)
            plan = self._plan(manifest)
        with self._part("attach_ms"):
            loaded = self._attach(manifest, plan, self._pool_fd, self._board_fd, directory=self._directory)
            self._loads.enter_context(loaded)
        with self._part("tensors_ms"):
            tensors = dict(loaded.tensors())
        with self._part("touch_ms"):
            loaded.touch()
        return tensors

    def _part(self, name: str) -> ExitStack:
        began_s = time.perf_counter()
        stack = ExitStack()
        stack.callback(lambda: self.parts.__setitem__(name, (time.perf_counter() - began_s) * 1e3))
        return stack


def import_torch() -> None:
    """With what it imports at its first use: no contestant is timed importing."""
    import torch

    read_pages(torch.frombuffer(bytearray(4), dtype=torch.bfloat16).view(1, 2))


def read_pages(tensor: Any) -> None:
    """Read one byte of every page that a CPU tensor lies on."""
    import torch

    octets = tensor.reshape(-1).view(torch.uint8).numpy()
    octets[::PAGE_BYTES].sum()
    octets[-1:].sum()


def wrong_tensors(tensors: Tensors, record: Mapping[str, Sequence[Any]]) -> list[str]:
    """Names that are missing, too many, or differ in shape or bytes from the record of name → [shape, digest]."""
    import torch
    import xxhash

    def same(name: str) -> bool:
        if name not in tensors or name not in record:
            return False
        shape, digest = record[name]
        octets = tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return bool(list(tensors[name].shape) == shape and xxhash.xxh3_128_hexdigest(octets) == digest)

    return sorted(name for name in tensors.keys() | record.keys() if not same(name))


CHILDREN: dict[str, type[Contestant]] = {
    "sequential": SequentialRead,
    "stoker": Stoker,
    "pool": StokerPool,
    "runai": RunAi,
    "safetensors": Safetensors,
    "safetensors_mapped": MappedSafetensors,
    "fastsafetensors": FastSafetensors,
    "torch": TorchLoad,
}

PACKAGES = {
    "runai": ("runai-model-streamer", "pip install --no-deps runai-model-streamer==0.17.0 humanize"),
    "safetensors": ("safetensors", "pip install safetensors"),
    "safetensors_mapped": ("safetensors", "pip install safetensors"),
    "fastsafetensors": ("fastsafetensors", "pip install --no-deps fastsafetensors==0.5.0"),
    "torch": ("torch", "pip install torch"),
    "instanttensor": ("instanttensor", "pip install --no-deps instanttensor==0.2.2"),
}
"""What a contestant needs beside Stoker, and how to get it."""


def installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
