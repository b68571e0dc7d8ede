"""The `sim` engine: no model at all. For control-plane and load tests only.

Its next token is a hash of all tokens so far, so a request resumed elsewhere goes on with the very same
tokens, and a lost or doubled token changes everything after it. It reads its weights like a real engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from stoker_checkpoint.leased import read_manifest
from stoker_checkpoint.load import attach
from stoker_checkpoint.plan import plan_reads
from stoker_contracts.inference import Finish, Sampling
from stoker_contracts.models import ModelSpec
from stoker_worker.engines.base import EngineOutput, EngineRequest
from stoker_worker.instance.lease import Lease

_MULTIPLIER, _MASK = 6364136223846793005, (1 << 64) - 1


def mix(state: int, token: int) -> int:
    """Hash of a token sequence, one token at a time (Knuth's MMIX linear congruential step)."""
    return (state * _MULTIPLIER + token + 1442695040888963407) & _MASK


def sequence_state(tokens: Sequence[int]) -> int:
    state = 0
    for token in tokens:
        state = mix(state, token)
    return state


@dataclass(slots=True)
class _Running:
    state: int
    produced: int
    sampling: Sampling


class SimEngine:
    """lease: ends once every page of the weights was read.  step_s: duration of one step, whatever the batch."""

    def __init__(self, spec: ModelSpec, lease: Lease, *, step_s: float) -> None:
        self._vocab, self._step_s = spec.vocab_size, step_s
        self._running: dict[str, _Running] = {}
        began = time.monotonic()
        manifest = read_manifest(lease.path)
        with attach(
            manifest,
            plan_reads(manifest),
            lease.pool_fd,
            lease.board_fd,
            directory=lease.path,
            alive=lease.alive,
        ) as weights:
            weights.touch()
        self._load_ms = (time.monotonic() - began) * 1e3
        lease.used(load_ms=self._load_ms)

    @property
    def load_ms(self) -> float:
        return self._load_ms

    def add(self, request: EngineRequest) -> None:
        self._running[request.key] = _Running(sequence_state(request.prompt), 0, request.sampling)

    def abort(self, key: str) -> None:
        self._running.pop(key, None)

    def has_work(self) -> bool:
        return bool(self._running)

    def step(self) -> list[EngineOutput]:
        time.sleep(self._step_s)
        outputs = []
        for key, running in list(self._running.items()):
            token = (running.state >> 33) % self._vocab
            running.state = mix(running.state, token)
            running.produced += 1
            finish = None
            if token in running.sampling.stop_token_ids and not running.sampling.ignore_eos:
                finish = Finish.STOP
            elif running.produced >= running.sampling.max_tokens:
                finish = Finish.LENGTH
            if finish:
                del self._running[key]
            outputs.append(EngineOutput(key, (token,), finish))
        return outputs
