"""The `vllm` engine: an in-process LLMEngine, one to an instance, built and stepped in the main thread.

vLLM's own engine-core process is left out (VLLM_ENABLE_V1_MULTIPROCESSING=0): an instance is forked from
a zygote with every import paid, and spawning a second process would pay them again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from stoker_checkpoint.vllm_loader import LOAD_FORMAT, register, when_loaded
from stoker_contracts.inference import Finish
from stoker_contracts.models import DeviceKind, ModelSpec
from stoker_core.errors import EngineFailed, InvalidRequest, StokerError
from stoker_worker.engines.base import EngineOutput, EngineRequest
from stoker_worker.instance.lease import Lease

# vLLM attends on CPU in blocks of 32 tokens at least; small blocks keep prefixes shareable.
_BLOCK_TOKENS = {DeviceKind.CPU: 32, DeviceKind.CUDA: 16}
_SEED_OF_MINUS_ONE = 2**63 - 1
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}

register()  # in the zygote, so that no start pays for it


class VllmEngine:
    """lease: on the model that lies at `path`; it ends as soon as its weights are in vLLM. Without one they are read here.

    Raises EngineFailed if vLLM cannot be built within `spec`'s limits, and what the loader raises.
    """

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        *,
        lease: Lease | None = None,
        device: DeviceKind,
        device_bytes: int,
        batched_tokens_max: int,
    ) -> None:
        self._vocab_size = spec.vocab_size
        self._load_ms = 0.0
        self._lease = lease
        options: dict[str, Any] = {"enforce_eager": True}
        if device == DeviceKind.CUDA:
            # Compilation costs minutes; graphs of few decode batch sizes cost seconds and give most of the speed.
            sizes = [n for n in (1, 2, 4, 8, 16, 32) if n <= spec.slots]
            options = {
                "compilation_config": {
                    "mode": 0,
                    "cudagraph_mode": "FULL_DECODE_ONLY",
                    "cudagraph_capture_sizes": sizes,
                },
                # vLLM's start-up check ignores kv_cache_memory_bytes and compares this share with what is free.
                "gpu_memory_utilization": min(0.95, spec.gpu_bytes / max(device_bytes, 1)),
            }
        try:
            with when_loaded(self._loaded):
                self._engine = LLMEngine.from_engine_args(
                    EngineArgs(
                        model=str(path),
                        skip_tokenizer_init=True,
                        load_format=LOAD_FORMAT,
                        model_loader_extra_config=_loader_options(lease),
                        use_tqdm_on_load=False,
                        dtype=spec.dtype,
                        max_model_len=spec.max_model_len,
                        max_num_seqs=spec.slots,
                        max_num_batched_tokens=max(batched_tokens_max, spec.slots),
                        kv_cache_memory_bytes=spec.kv_cache_bytes,
                        block_size=_BLOCK_TOKENS[device],
                        enable_prefix_caching=True,
                        distributed_executor_backend="uni",
                        disable_log_stats=True,
                        # Forked siblings would otherwise sample identical "random" tokens: the default seed is 0.
                        seed=int.from_bytes(os.urandom(4), "little"),
                        **options,
                    )
                )
        except StokerError:
            raise
        except Exception as error:
            raise EngineFailed(f"vLLM cannot start {spec.name}: {type(error).__name__}: {error}") from error

    def _loaded(self, load_ms: float) -> None:
        self._load_ms = load_ms
        if self._lease is not None:
            self._lease.used(load_ms=load_ms)

    @property
    def load_ms(self) -> float:
        return self._load_ms

    def add(self, request: EngineRequest) -> None:
        sampling = request.sampling
        # vLLM checks this against a tokenizer only; in the model it ends every request there is.
        if (highest := max(request.prompt, default=0)) >= self._vocab_size:
            raise InvalidRequest(f"token id {highest} is outside the vocabulary of {self._vocab_size}")
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        try:
            params = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                # To vLLM −1 means "none"; to clients it is a seed like any other.
                seed=_SEED_OF_MINUS_ONE if sampling.seed == -1 else sampling.seed,
                # Without a tokenizer vLLM knows no end-of-sequence token: the gateway names them all.
                stop_token_ids=[] if sampling.ignore_eos else list(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(request.key, prompt, params)
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequest(str(error)) from error

    def abort(self, key: str) -> None:
        self._engine.abort_request([key])

    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[EngineOutput]:
        try:
            results = self._engine.step()
        except Exception as error:
            raise EngineFailed(f"vLLM failed in a step: {type(error).__name__}: {error}") from error
        outputs = []
        for result in results:
            completion = result.outputs[0]
            finish, error_text = None, ""
            if result.finished:
                finish = _FINISH.get(completion.finish_reason or "", Finish.ERROR)
                if finish == Finish.ERROR:
                    error_text = f"vLLM ended the request: {completion.finish_reason}"
            outputs.append(EngineOutput(result.request_id, completion.token_ids, finish, error_text))
        return outputs


def _loader_options(lease: Lease | None) -> dict[str, int]:
    if lease is None:
        return {}
    return {
        "pool_fd": lease.pool_fd,
        "board_fd": lease.board_fd,
        "lease_fd": lease.fileno(),
        "ring_fd": lease.ring_fd,
        "ring_board_fd": lease.ring_board_fd,
    }
