"""What vLLM says, with one loader and another.

Every case runs in a fork of one process that has paid the imports, as an instance does: `python -m tests.support.vllm_tokens
<descriptor>`. It takes cases as JSON from that socket, with their descriptors, and answers each with an outcome.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.support.lent import USED

REPOSITORY = Path(__file__).parents[2]
TOKENS = 32
CONTEXT = 256
TIMEOUT_S = 240.0
MESSAGE_BYTES_MAX = 64 * 1024
DESCRIPTORS_MAX = 8


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """options: vLLM's model_loader_extra_config; what ends in _fd goes along.  ranks: of tensor parallelism, each a process."""

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


class Vllm:
    """That process. Ended on leaving the context. directory: for its cache and its log."""

    def __init__(self, directory: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("STOKER_", "VLLM_"))}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(directory / "cache"),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self._log = directory / "log"
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(TIMEOUT_S)
        with theirs, self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.vllm_tokens", str(theirs.fileno())],
                cwd=REPOSITORY,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdout=output,
                stderr=output,
            )

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()  # it ends when it notices
        try:
            assert self._process.wait(TIMEOUT_S) == 0, self._said()
        finally:
            self._process.kill()
            self._process.wait()

    def outcomes(self, cases: Sequence[Case]) -> list[Outcome]:
        """Of cases that run one after the other."""
        return [self._outcome(case) for case in cases]

    def _outcome(self, case: Case) -> Outcome:
        descriptors = [value for name, value in case.options.items() if name.endswith("_fd")]
        socket.send_fds(self._socket, [msgspec.json.encode(case)], descriptors)
        answer = self._socket.recv(MESSAGE_BYTES_MAX)
        assert answer, self._said()
        return msgspec.json.decode(answer, type=Outcome)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-8000:]


def main() -> None:
    import stoker_worker.engines.vllm  # noqa: F401 - all that a zygote imports, and the load format
    from stoker_worker.zygote.architecture import inspect_architecture
    from stoker_worker.zygote.main import os_threads

    assert os_threads() == 1, "a zygote must be fit to fork after its imports"
    assert _in_fork(lambda: inspect_architecture("LlamaForCausalLM")) == 0
    with socket.socket(fileno=int(sys.argv[1])) as asking:
        while True:
            message, descriptors, _, _ = socket.recv_fds(asking, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX)
            if not message:
                return
            case = _with_own(msgspec.json.decode(message, type=Case), descriptors)
            status = _in_fork(lambda case=case: _run(case, asking))
            for descriptor in descriptors:
                os.close(descriptor)
            if status:
                asking.sendall(msgspec.json.encode(Outcome(error=f"it ended with status {status}")))


def _with_own(case: Case, descriptors: Sequence[int]) -> Case:
    """Its descriptors as they are numbered here."""
    own = iter(descriptors)
    options = {name: next(own) if name.endswith("_fd") else value for name, value in case.options.items()}
    return msgspec.structs.replace(case, options=options)


def _in_fork(work: Callable[[], object]) -> int:
    """Returns its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may unwind into the parent's frames
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(case: Case, asking: socket.socket) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        outcome = _generate(case)
    except Exception as error:  # noqa: BLE001 - it is the outcome
        outcome = Outcome(error=f"{type(error).__name__}: {error}"[: MESSAGE_BYTES_MAX // 8])
    asking.sendall(msgspec.json.encode(outcome))


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
