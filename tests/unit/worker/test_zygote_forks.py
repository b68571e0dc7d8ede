"""The zygote where the kernel gives it no further process."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.worker.test_worker_state import spec

from stoker_contracts.models import DeviceKind
from stoker_worker.wire import (
    Fork,
    ForkRefused,
    FromZygote,
    InstanceConfig,
    Prepare,
    Prepared,
    pack,
    packet_pair,
    unpack,
)
from stoker_worker.zygote import main as module
from stoker_worker.zygote.main import Zygote

CONFIG = InstanceConfig(
    instance_id="i-1",
    node="n",
    model=spec(),
    device_kind=DeviceKind.CPU,
    devices=(0,),
    device_bytes=1,
    nats_url="",
    store_socket=Path("/nowhere"),
    threads=1,
    batched_tokens_max=1,
    sim_step_s=0.0,
    lease_timeout_s=1.0,
    drain_s=1.0,
    started_at_s=0.0,
    log_level="info",
    log_format="json",
)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, Zygote]]:
    def refused() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refused)
    monkeypatch.setattr(module, "os_threads", lambda: 1)
    ours, theirs = packet_pair()
    with ours, theirs:
        yield ours, Zygote(theirs, wake=-1)


def test_a_fork_that_the_kernel_refuses_fails_that_start_and_leaves_the_zygote_serving(
    worker: tuple[socket.socket, Zygote],
) -> None:
    ours, zygote = worker
    channel, passed = packet_pair()
    before = len(os.listdir("/proc/self/fd"))
    with channel, passed:
        socket.send_fds(ours, [pack(Fork(config=CONFIG))], [passed.fileno()])
        assert zygote._serve_one()
        answer = unpack(FromZygote, ours.recv(1 << 17))
        assert isinstance(answer, ForkRefused)
        assert answer.instance_id == "i-1"
        assert "Cannot allocate memory" in answer.reason
        assert len(os.listdir("/proc/self/fd")) == before, "the channel it was passed is closed"


def test_a_preparation_that_the_kernel_refuses_is_answered(worker: tuple[socket.socket, Zygote]) -> None:
    ours, zygote = worker
    ours.send(pack(Prepare(architecture="LlamaForCausalLM")))
    assert zygote._serve_one()
    answer = unpack(FromZygote, ours.recv(1 << 17))
    assert isinstance(answer, Prepared)
    assert "Cannot allocate memory" in answer.failure
