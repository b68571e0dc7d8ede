"""What a forked child runs: the engine in the main thread, NATS in another."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
import traceback

from stoker_contracts.models import DeviceKind
from stoker_core.errors import StokerError
from stoker_core.logging import get_logger, setup_logging
from stoker_core.tracing import setup_tracing
from stoker_worker.instance.host import CommandQueue, run_engine, start_engine
from stoker_worker.instance.serve import InstanceServer
from stoker_worker.processes import set_name
from stoker_worker.wire import Broken, InstanceConfig, pack

log = get_logger("instance")


def run_instance(config: InstanceConfig, channel: socket.socket) -> int:
    """Serve one model until stopped; returns the exit code."""
    forked_at_s = time.monotonic()
    set_name(f"inst:{config.model.name}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker stops instances through their channel
    setup_logging(
        "instance",
        level=config.log_level,
        log_format=config.log_format,
        node=config.node,
        instance=config.instance_id,
        model=config.model.name,
    )
    setup_tracing("instance", **{"stoker.node": config.node, "stoker.instance": config.instance_id})
    if config.device_kind == DeviceKind.CUDA:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's, by which the devices are numbered
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.devices))

    commands = CommandQueue()
    server = InstanceServer(config, channel, commands)
    up = threading.Event()
    ended = threading.Event()

    def serve() -> None:
        async def main() -> None:
            server.attach()
            up.set()
            await server.run()

        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - the thread's last word; the process ends with it
            traceback.print_exc()
            _report_broken(channel, error)
            os._exit(1)
        ended.set()

    threading.Thread(target=serve, name="nats", daemon=True).start()
    up.wait()
    try:
        engine, ready = start_engine(config, forked_at_s=forked_at_s)
        log.info(
            "engine_ready",
            start_ms=round(ready.phases.start_ms),
            source=ready.load_source,
            origin=ready.load_origin,
        )
        server.announce(ready)
        run_engine(engine, commands, server.deliver)
        server.engine_ended()
    except StokerError as error:
        log.error("engine_failed", code=error.code, error=error.message)
        _report_broken(channel, error)
        return 1
    ended.wait(timeout=5.0)
    return 0


def _report_broken(channel: socket.socket, error: BaseException) -> None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    code = error.code if isinstance(error, StokerError) else "internal"
    message = str(error)[:2000]
    try:
        channel.send(pack(Broken(code=code, message=message)))
    except OSError:
        return  # the worker is gone as well
