"""The zygote: a process with every import paid that forks instances.

It does no tensor operation, opens no CUDA context and has one OS thread: OpenMP pools and other threads
do not survive a fork, and a child that meets their locks hangs. `gc.freeze` keeps children from walking
and copying its objects, which halves their start.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

from stoker_contracts.models import EngineKind
from stoker_worker.instance.main import run_instance
from stoker_worker.processes import die_with_parent, set_name
from stoker_worker.wire import (
    PACKET_BYTES_MAX,
    ChildExited,
    Fork,
    Forked,
    ForkRefused,
    FromZygote,
    Prepare,
    Prepared,
    ToZygote,
    ZygoteReady,
    pack,
    unpack,
)
from stoker_worker.zygote.architecture import inspect_architecture, module_of

_PRELOADED = {
    EngineKind.VLLM: (
        "stoker_worker.engines.vllm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.llama",
        # What vLLM 0.32 imports only while it builds an engine: 150 modules, 50 ms of every start.
        "vllm.model_executor.layers.quantization.online.base",
        "vllm.distributed.elastic_ep.elastic_execute",
        "vllm.plugins.lora_resolvers.filesystem_resolver",
        "vllm.plugins.lora_resolvers.hf_hub_resolver",
        "vllm.renderers.hf",
    ),
    EngineKind.SIM: ("stoker_worker.engines.sim",),
}
_PRELOADED_CUDA = ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner")


def os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


class Zygote:
    def __init__(self, control: socket.socket, *, wake: int) -> None:
        self._control, self._wake = control, wake
        self._children: dict[int, str] = {}
        self._inspections: dict[int, str] = {}

    def run(self) -> None:
        """Serve the worker until it is gone."""
        while True:
            readable, _, _ = select.select([self._control.fileno(), self._wake], [], [])
            if self._wake in readable:
                os.read(self._wake, 512)
                self._reap()
            if self._control.fileno() in readable and not self._serve_one():
                return

    def _serve_one(self) -> bool:
        packet, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES_MAX, 1)
        if not packet:
            return False
        match unpack(ToZygote, packet):
            case Fork() as fork:
                self._fork(fork, fds[0])
                os.close(fds[0])
            case Prepare(architecture=architecture):
                self._prepare(architecture)
        return True

    def _fork(self, fork: Fork, channel: int) -> None:
        instance_id = fork.config.instance_id
        threads = os_threads()
        if threads != 1:
            self._send(ForkRefused(instance_id=instance_id, reason=f"the zygote has {threads} OS threads, not one"))
            return
        try:
            pid = self._child(lambda: run_instance(fork.config, socket.socket(fileno=channel)))
        except OSError as error:  # no memory or processes left: the instances that run are not to pay for it
            self._send(ForkRefused(instance_id=instance_id, reason=f"the zygote cannot fork: {error}"))
            return
        self._children[pid] = instance_id
        self._send(Forked(instance_id=instance_id, pid=pid))

    def _prepare(self, architecture: str) -> None:
        # In a child: inspecting may start threads or touch the GPU, and the zygote must stay fit to fork.
        try:
            pid = self._child(lambda: inspect_architecture(architecture))
        except OSError as error:
            self._send(Prepared(architecture=architecture, failure=f"the zygote cannot fork: {error}"))
            return
        self._inspections[pid] = architecture

    def _inspected(self, architecture: str, status: int) -> None:
        failure = "" if status == 0 else f"vLLM cannot inspect {architecture} (status {status}; see the worker's log)"
        if status == 0:
            try:
                importlib.import_module(module_of(architecture))
            except ImportError as error:
                failure = f"{architecture} cannot be imported: {error}"
            gc.collect()
            gc.freeze()
        self._send(Prepared(architecture=architecture, failure=failure))

    def _child(self, work: Callable[[], int]) -> int:
        """Fork; the child does `work` and exits with what it returns. Raises OSError if it cannot fork."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.close(self._wake)
            code = work()
        except BaseException:  # noqa: BLE001 - nothing may unwind into the zygote's frames
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._children or self._inspections:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            status = os.waitstatus_to_exitcode(wait_status)
            if pid in self._inspections:
                self._inspected(self._inspections.pop(pid), status)
            elif pid in self._children:
                self._send(ChildExited(instance_id=self._children.pop(pid), status=status))

    def _send(self, message: FromZygote) -> None:
        self._control.send(pack(message))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True, type=EngineKind)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--fd", required=True, type=int)
    parser.add_argument("--parent", required=True, type=int)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    set_name(f"zygote:{arguments.engine}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the worker's to handle
    control = socket.socket(fileno=arguments.fd)
    control.set_inheritable(False)

    # vLLM's own set-up of its loggers (see VLLM_CONFIGURE_LOGGING) walks every logger there is, in every fork.
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))

    began = time.monotonic()
    for module in _PRELOADED[arguments.engine]:
        importlib.import_module(module)
    if arguments.cuda and arguments.engine == EngineKind.VLLM:
        for module in _PRELOADED_CUDA:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()

    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    control.send(pack(ZygoteReady(import_ms=(time.monotonic() - began) * 1e3)))
    Zygote(control, wake=wake_read).run()
    os._exit(0)  # the worker is gone; tearing down every imported library would only delay the kernel


if __name__ == "__main__":
    main()
