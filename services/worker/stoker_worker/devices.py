"""The devices of this machine: its GPUs, or shares of its CPUs and memory."""

from __future__ import annotations

import os

from stoker_contracts.models import Device, DeviceKind
from stoker_core.errors import InvalidSettings
from stoker_worker.settings import WorkerSettings

_MEMORY_SHARE = 0.6  # the rest is the storage agent's pool (a quarter by default), the system's and the services'


def discover(settings: WorkerSettings) -> tuple[Device, ...]:
    """Raises InvalidSettings if GPUs are demanded and there are none."""
    if settings.devices in ("auto", "cuda"):
        gpus = cuda_devices()
        if gpus:
            return gpus
        if settings.devices == "cuda":
            raise InvalidSettings("STOKER_WORKER_DEVICES is cuda, but no NVIDIA driver with a GPU was found")
    return cpu_slots(settings)


def cuda_devices() -> tuple[Device, ...]:
    """GPUs by NVML, which opens no CUDA context. Empty without the driver or its Python binding."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        devices = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            devices.append(Device(index=index, kind=DeviceKind.CUDA, name=str(name), memory_bytes=int(memory.total)))
        return tuple(devices)
    finally:
        pynvml.nvmlShutdown()


def cuda_uuid(index: int) -> str:
    """What identifies a GPU to every process, whatever CUDA_VISIBLE_DEVICES says there. Empty if NVML does not tell."""
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""


def cpu_slots(settings: WorkerSettings) -> tuple[Device, ...]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = settings.slot_memory_bytes or int(total * _MEMORY_SHARE) // settings.cpu_slots
    name = f"CPU slot, {settings.threads} thread{'s' if settings.threads > 1 else ''}"
    return tuple(
        Device(index=index, kind=DeviceKind.CPU, name=name, memory_bytes=memory) for index in range(settings.cpu_slots)
    )
