"""The model loader behind vLLM's load format `stoker`. Imports vLLM and torch: `vllm_loader.register` imports it."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterable, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from stoker_checkpoint.device_ring import DeviceCheckpoint, attach_ring
from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.load import LoadedCheckpoint, attach, load
from stoker_checkpoint.manifest import Manifest
from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_checkpoint.pool import Pool
from stoker_checkpoint.vllm_loader import Options, connected, parse_options, report_loaded
from stoker_core.errors import RefusedCheckpoint

_WINDOW_CHUNKS_MIN = 4
"""Of a pool that a checkpoint streams through: fewer, and the disk waits for the consumer."""


class StokerModelLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's default loader, reading by Stoker: which weights a model takes, and that it got them all, vLLM checks.

    Under a lease all ranks share one read; what a rank does not want it skips. Tensors that a model keeps stay valid:
    they get memory of their own when their load closes: with `load_weights`, or with this loader. Those that came through
    a ring on a GPU are there already, and keep the whole ring's memory as long as one of them is kept.
    Raises InvalidSettings for options it does not know, and what `stoker_checkpoint.load` raises.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._given = load_config
        self._options = parse_options(load_config.model_loader_extra_config)
        self._loads = ExitStack()
        # Of a reload, which asks for `get_all_weights` alone. Not at the end of the iterator: whoever iterates still has
        # the last tensor in hand there, and it would be copied.
        weakref.finalize(self, self._loads.close)
        super().__init__(dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config={}))

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        began_s = self.counter_before_loading_weights = time.perf_counter()  # the latter is for vLLM's log
        try:
            super().load_weights(model, model_config)
        finally:
            self._loads.close()  # from here on the lease may end
        report_loaded((time.perf_counter() - began_s) * 1e3)

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterable[tuple[str, torch.Tensor]]:
        """Of the model itself, and of each further checkpoint that a multimodal model is put together from."""
        self._refuse(source)
        manifest, directory = self._find(source)
        unused = source.is_unused_weight or (lambda name: False)
        wanted = {
            tensor.name
            for tensor in manifest.tensors
            if not (unused(tensor.name) or should_skip_weight(tensor.name, self.local_expert_ids))
        }
        checkpoint = self._open(manifest, directory, wanted)
        return ((source.prefix + name, tensor) for name, tensor in checkpoint.tensors() if name in wanted)

    def _find(self, source: DefaultModelLoader.Source) -> tuple[Manifest, Path]:
        """The manifest, and the directory that it is of. A leased folder has no shards for vLLM to find."""
        if self._options.leased:
            return read_manifest(Path(source.model_or_path)), Path(source.model_or_path)
        folder, *_ = self._prepare_weights(source.model_or_path, source.subfolder, source.revision, False, None)
        return open_checkpoint(Path(folder)), Path(folder)

    def _refuse(self, source: DefaultModelLoader.Source) -> None:
        if source.allow_patterns_overrides is not None:
            raise RefusedCheckpoint(
                source.model_or_path,
                f"the model asks for the files {source.allow_patterns_overrides}; "
                "load format stoker reads a checkpoint's own shards only",
            )
        if self.load_config.safetensors_load_strategy == "torchao":
            raise RefusedCheckpoint(
                source.model_or_path,
                "torchao puts its weights together from several tensors; use --load-format safetensors",
            )

    def _open(self, manifest: Manifest, directory: Path, wanted: Set[str]) -> LoadedCheckpoint | DeviceCheckpoint:
        """From the leased pool, or the ring that it feeds, the first time; else through a pool of this process's own."""
        options = self._options
        if options.leased:
            # A reload makes a new loader from the same configuration, when these numbers may mean other files. It needs
            # a model directory with shards, which a leased folder is not.
            self._options, self._given.model_loader_extra_config = Options(), {}
            alive = partial(connected, options.lease_fd)
            plan = plan_reads(manifest)
            if options.ringed:
                return attach_ring(
                    manifest,
                    plan,
                    options.ring_fd,
                    options.ring_board_fd,
                    directory=directory,
                    device=torch.cuda.current_device(),
                    alive=alive,
                )
            return self._loads.enter_context(
                attach(manifest, plan, options.pool_fd, options.board_fd, directory=directory, alive=alive)
            )
        names = wanted if len(wanted) < len(manifest.tensors) else None
        need_bytes = len(plan_reads(manifest, names).positions) * CHUNK_BYTES
        room_bytes = options.pool_bytes or _free_memory_bytes() // 2
        size_bytes = min(need_bytes, max(room_bytes, _WINDOW_CHUNKS_MIN * CHUNK_BYTES))
        # It is used once: huge and locked pages would cost more than they bring.
        pool = self._loads.enter_context(Pool(size_bytes, huge="none", lock=False))
        window_bytes = size_bytes if size_bytes < need_bytes else 0
        return self._loads.enter_context(load(manifest, pool, directory, names=names, window_bytes=window_bytes))


def _free_memory_bytes() -> int:
    """What can be had without swapping. Source: proc(5), meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise AssertionError("this kernel tells no MemAvailable")
