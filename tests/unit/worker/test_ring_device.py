"""For whom an instance asks the storage agent for a ring."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.unit.worker.test_zygote_forks import CONFIG

from stoker_contracts.models import DeviceKind, EngineKind
from stoker_worker.instance.host import _ring_device
from stoker_worker.wire import InstanceConfig


class NVMLError(Exception):
    pass


def nvml(**calls: Any) -> SimpleNamespace:
    """NVML on a machine whose GPUs are called by their number."""
    working = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
    }
    return SimpleNamespace(NVMLError=NVMLError, **(working | calls))


def refuse(*_: Any) -> None:
    raise NVMLError


def config(kind: DeviceKind, devices: tuple[int, ...], engine: EngineKind = EngineKind.VLLM) -> InstanceConfig:
    model = msgspec.structs.replace(CONFIG.model, engine=engine)
    return msgspec.structs.replace(CONFIG, model=model, device_kind=kind, devices=devices)


def test_an_instance_on_one_gpu_names_it_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert _ring_device(config(DeviceKind.CUDA, (3,))) == "GPU-3"


@pytest.mark.parametrize(
    "given",
    [
        config(DeviceKind.CPU, (0,)),
        config(DeviceKind.CUDA, (0, 1)),
        config(DeviceKind.CUDA, (0,), EngineKind.SIM),
    ],
    ids=["cpu", "tensor parallel", "sim"],
)
def test_others_do_not_even_look(monkeypatch: pytest.MonkeyPatch, given: InstanceConfig) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlInit=lambda: pytest.fail("NVML was asked")))
    assert _ring_device(given) == ""


@pytest.mark.parametrize("missing", [None, nvml(nvmlInit=refuse), nvml(nvmlDeviceGetUUID=refuse)])
def test_without_nvml_there_is_no_ring(monkeypatch: pytest.MonkeyPatch, missing: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", missing)
    assert _ring_device(config(DeviceKind.CUDA, (0,))) == ""
