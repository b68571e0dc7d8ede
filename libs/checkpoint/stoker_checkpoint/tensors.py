"""Which torch dtype and shape a tensor of a checkpoint has."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from stoker_checkpoint.header import TensorRef, shown
from stoker_core.errors import RefusedCheckpoint

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
TORCH_DTYPES = frozenset(_TORCH_NAMES)
"""The dtypes of safetensors that torch has, too."""


def torch_type(directory: Path, tensor: TensorRef) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape in torch. Two F4 share one element there, so the last dimension is half as long.

    directory: of its shard, for messages.  Raises RefusedCheckpoint for what torch cannot hold.
    """
    dtype = _dtype(tensor.dtype)
    if dtype is None:
        raise _refused(directory, tensor, f"this torch has no dtype {tensor.dtype}")
    if tensor.dtype != "F4":
        return dtype, tensor.shape
    if not tensor.shape or tensor.shape[-1] % 2:
        raise _refused(directory, tensor, "its last dimension is odd, and F4 come in pairs")
    return dtype, (*tensor.shape[:-1], tensor.shape[-1] // 2)


def _refused(directory: Path, tensor: TensorRef, reason: str) -> RefusedCheckpoint:
    return RefusedCheckpoint(str(directory / tensor.shard), f"tensor {shown(tensor.name)}: {reason}")


@lru_cache
def _dtype(name: str) -> torch.dtype | None:
    import torch

    return getattr(torch, _TORCH_NAMES.get(name, ""), None)
