"""vLLM's load format `stoker`: weights come from a pool of pinned memory. A plug-in of vLLM.

    vllm serve MODEL --load-format stoker

Entry point of the group `vllm.general_plugins`. Importing this module costs nothing: vLLM itself is imported by `register`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import msgspec

from stoker_core.errors import InvalidSettings

LOAD_FORMAT = "stoker"

_when_loaded: ContextVar[Callable[[float], None] | None] = ContextVar("when_loaded", default=None)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `model_loader_extra_config`.

    pool_fd, board_fd, lease_fd: a lease on this model that this process or its parent holds: the pool, the load in it,
    and the socket whose other end is open for as long as the lease is. Together or not at all, for one load.
    ring_fd, ring_board_fd: the ring that this load is fed into, if the lease has one: in the memory of the GPU that is the
    current one where the model is loaded, and that is no rank of several.
    pool_bytes: size of the pool that is made where there is no lease; 0: the whole checkpoint, if half of the free memory
    has room for it. A checkpoint larger than its pool streams through it.
    """

    pool_fd: int = -1
    board_fd: int = -1
    lease_fd: int = -1
    ring_fd: int = -1
    ring_board_fd: int = -1
    pool_bytes: int = 0

    @property
    def leased(self) -> bool:
        return self.pool_fd >= 0

    @property
    def ringed(self) -> bool:
        return self.ring_fd >= 0


def parse_options(given: Any) -> Options:
    """Raises InvalidSettings, naming what cannot be used."""
    try:
        options = msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        raise InvalidSettings(f"model_loader_extra_config of load format {LOAD_FORMAT}: {error}") from error
    descriptors = {options.pool_fd >= 0, options.board_fd >= 0, options.lease_fd >= 0}
    ring = {options.ring_fd >= 0, options.ring_board_fd >= 0}
    if len(descriptors) != 1 or options.pool_bytes < 0 or (options.leased and options.pool_bytes):
        raise InvalidSettings(
            f"model_loader_extra_config of load format {LOAD_FORMAT}: "
            "either pool_fd, board_fd and lease_fd, or pool_bytes, or nothing"
        )
    if len(ring) != 1 or (options.ringed and not options.leased):
        raise InvalidSettings(
            f"model_loader_extra_config of load format {LOAD_FORMAT}: ring_fd and ring_board_fd only together, of a lease"
        )
    return options


@cache
def register() -> None:
    """Make the load format known to vLLM in this process; again, it does nothing."""
    from vllm.model_executor.model_loader import register_model_loader

    from stoker_checkpoint.vllm_weights import StokerModelLoader

    register_model_loader(LOAD_FORMAT)(StokerModelLoader)


@contextmanager
def when_loaded(call: Callable[[float], None]) -> Iterator[None]:
    """Have `call` told, within this block and thread, that a model has its own copy of all weights, and in how many ms.

    By then this process reads nothing from the lease any more, though the engine is far from built. Ranks in forks of it
    do not tell: no single one may end what all share.
    """
    process = os.getpid()

    def here(load_ms: float) -> None:
        if os.getpid() == process:
            call(load_ms)

    token = _when_loaded.set(here)
    try:
        yield
    finally:
        _when_loaded.reset(token)


def report_loaded(load_ms: float) -> None:
    call = _when_loaded.get()
    if call is not None:
        call(load_ms)


def connected(fd: int) -> bool:
    """Whether the other end of a stream socket is open."""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return not poll.poll(0)
