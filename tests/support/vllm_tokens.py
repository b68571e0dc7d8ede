"""What vLLM says, with one loader and another: `python -m tests.support.vllm_tokens '<cases as JSON>'`.

Every case runs in a fork of one process that has paid the imports, as an instance does; a line of JSON is printed for each.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.support.lent import USED

REPOSITORY = Path(__file__).parents[2]
TOKENS = 32
CONTEXT = 256
TIMEOUT_S = 240.0


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """options: vLLM's model_loader_extra_config.  ranks: of tensor parallelism, each a process of its own."""

    path: str
    load_format: str
    prompts: tuple[tuple[int, ...], ...]
    options: dict[str, int] = {}
    ranks: int = 1


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """tokens: of each prompt, greedy, in float32.  load_ms: in `load_weights`.  error: instead of all that."""

    tokens: list[list[int]] = []
    load_ms: float = 0.0
    error: str = ""


def outcomes(cache: Path, cases: Sequence[Case], *, pass_fds: Iterable[int] = ()) -> list[Outcome]:
    """Run the cases one after the other in a process of their own, which inherits `pass_fds`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("STOKER_", "VLLM_"))}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [sys.executable, "-m", "tests.support.vllm_tokens", msgspec.json.encode(list(cases)).decode()]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, pass_fds=tuple(pass_fds), capture_output=True, text=True, timeout=TIMEOUT_S
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), done.stdout[-4000:] + done.stderr[-8000:]
    return [msgspec.json.decode(line, type=Outcome) for line in lines]


def main() -> None:
    import stoker_worker.engines.vllm  # noqa: F401 - all that a zygote imports, and the load format
    from stoker_worker.zygote.architecture import inspect_architecture
    from stoker_worker.zygote.main import os_threads

    cases = msgspec.json.decode(sys.argv[1], type=list[Case])
    assert os_threads() == 1, "a zygote must be fit to fork after its imports"
    _in_fork(lambda: inspect_architecture("LlamaForCausalLM"))
    for case in cases:
        _in_fork(lambda case=case: _run(case))


def _in_fork(work: Any) -> None:
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"status {status}"
        return
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - nothing may unwind into the parent's frames
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(case: Case) -> int:
    import torch

    torch.set_num_threads(1)
    try:
        outcome = _generate(case)
    except Exception as error:  # noqa: BLE001 - it is the outcome
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    print(json.dumps(msgspec.to_builtins(outcome)), flush=True)
    return 0


def _generate(case: Case) -> Outcome:
    from vllm import SamplingParams
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.sampling_params import RequestOutputKind

    from stoker_checkpoint.vllm_loader import when_loaded

    spent_ms: list[float] = []
    load_weights = DefaultModelLoader.load_weights

    def timed(self: Any, *arguments: Any) -> None:
        began_s = time.monotonic()
        load_weights(self, *arguments)
        spent_ms.append((time.monotonic() - began_s) * 1e3)

    def loaded(load_ms: float) -> None:
        spent_ms.append(load_ms)  # with the closing of the load
        if "lease_fd" in case.options:
            with socket.socket(fileno=os.dup(case.options["lease_fd"])) as lease:
                lease.sendall(USED)
                assert lease.recv(len(USED)) == USED

    DefaultModelLoader.load_weights = timed
    with when_loaded(loaded):
        engine = _engine(case)
    params = SamplingParams(
        max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    for number, prompt in enumerate(case.prompts):
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
    tokens: dict[int, list[int]] = {}
    while engine.has_unfinished_requests():
        tokens |= {int(out.request_id): list(out.outputs[0].token_ids) for out in engine.step() if out.finished}
    engine.engine_core.shutdown()
    load_ms = spent_ms[-1] if spent_ms else 0.0  # ranks do not tell
    return Outcome(tokens=[tokens[number] for number in sorted(tokens)], load_ms=load_ms)


def _engine(case: Case) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    config = EngineArgs(
        model=case.path,
        skip_tokenizer_init=True,
        load_format=case.load_format,
        model_loader_extra_config=case.options,
        use_tqdm_on_load=False,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=len(case.prompts),
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        enforce_eager=True,
        tensor_parallel_size=case.ranks,
        distributed_executor_backend="uni" if case.ranks == 1 else "mp",
        disable_log_stats=True,
    ).create_engine_config()
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # as instances are made; vLLM's CPU platform says spawn
    return LLMEngine.from_vllm_config(config)


if __name__ == "__main__":
    main()
