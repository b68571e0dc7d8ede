"""The instance's side towards gateways and its worker, in this process and on real NATS; the engine is the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_instance import model_spec
from tests.support.nats_server import NatsServer

from stoker_bus.nats import NatsBus
from stoker_bus.port import ask
from stoker_contracts import subjects
from stoker_contracts.codec import pack_tokens
from stoker_contracts.inference import Accepted, Generate, GenerateReply, Sampling
from stoker_contracts.models import DeviceKind, StartPhases, Tier
from stoker_core.errors import BusLost
from stoker_worker.instance.host import CommandQueue
from stoker_worker.instance.serve import InstanceServer
from stoker_worker.wire import (
    PACKET_BYTES_MAX,
    EngineReady,
    FromInstance,
    InstanceConfig,
    Stop,
    pack,
    packet_pair,
    unpack,
)

READY = EngineReady(phases=StartPhases(), load_source=Tier.SSD, ready_at_s=0.0)
REQUEST = Generate(
    request_id="r", attempt=1, gateway_id="g", prompt=pack_tokens([1]), sampling=Sampling(max_tokens=1000)
)


def config(nats_url: str) -> InstanceConfig:
    return InstanceConfig(
        instance_id="i",
        node="n",
        model=model_spec(),
        device_kind=DeviceKind.CPU,
        devices=(0,),
        device_bytes=0,
        nats_url=nats_url,
        store_socket=Path("/nowhere"),
        threads=1,
        batched_tokens_max=1,
        sim_step_s=0.0,
        lease_timeout_s=1.0,
        drain_s=0.1,
        started_at_s=0.0,
        log_level="info",
        log_format="json",
    )


@asynccontextmanager
async def serving(nats_url: str) -> AsyncIterator[tuple[InstanceServer, asyncio.Task[None], socket.socket]]:
    """A server, its task, and the worker's end of its channel."""
    ours, theirs = packet_pair()
    ours.setblocking(False)
    server = InstanceServer(config(nats_url), theirs, CommandQueue())
    server.attach()
    running = asyncio.create_task(server.run())
    try:
        yield server, running, ours
        if not running.done():
            ours.send(pack(Stop()))
            server.engine_ended()
            await running
    finally:
        asyncio.get_running_loop().remove_reader(theirs)  # the server ends its process where its worker is gone
        ours.close()
        theirs.close()


async def told(channel: socket.socket) -> Any:
    return unpack(FromInstance, await asyncio.get_running_loop().sock_recv(channel, PACKET_BYTES_MAX))


async def test_an_instance_is_ready_only_once_requests_can_reach_it(nats_server: NatsServer) -> None:
    nats_server.kill()
    async with serving(nats_server.url) as (server, _, channel):
        server.announce(READY)
        await asyncio.sleep(0.2)
        with pytest.raises(BlockingIOError):
            channel.recv(PACKET_BYTES_MAX)
        nats_server.start()
        assert await told(channel) == READY
        bus = await NatsBus.connect(nats_server.url, name="test")
        reply: GenerateReply = await ask(bus, subjects.instance_generate("n", "i"), REQUEST, GenerateReply, timeout_s=5)
        assert isinstance(reply, Accepted)
        await bus.close()


async def test_an_instance_that_can_never_send_again_ends(nats_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(nats_url) as (server, running, channel):
        server.announce(READY)
        await told(channel)
        bus = await NatsBus.connect(nats_url, name="test")
        await ask(bus, subjects.instance_generate("n", "i"), REQUEST, GenerateReply, timeout_s=5)
        await bus.close()

        async def lost(*args: object, **options: object) -> None:
            raise BusLost

        monkeypatch.setattr(NatsBus, "publish", lost)  # its next keepalive meets it
        async with asyncio.timeout(10):
            with pytest.raises(ExceptionGroup):
                await running
