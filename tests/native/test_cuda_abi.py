"""What csrc/cuda/abi.hpp declares by hand is what NVIDIA's cuda.h declares."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "libs/checkpoint/csrc"

COMPARISON = """
#include <cuda.h>
#include "cuda/abi.hpp"
#include <type_traits>

namespace ours = stoker::cuda;

// The same number of parameters, passed alike: both pointers or both no pointers, of the same size.
template <typename A, typename B>
constexpr bool alike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <typename F, typename G>
struct Same : std::false_type {};
template <typename R, typename... A, typename S, typename... B>
requires(sizeof...(A) == sizeof...(B))
struct Same<R(A...), S(B...)> : std::bool_constant<(alike<R, S> && ... && alike<A, B>)> {};

#define COMPARE(name, parameters) static_assert(Same<ours::Result parameters, decltype(::name)>::value, #name);
namespace stoker::cuda { STOKER_CUDA_CALLS(COMPARE) }

static_assert(sizeof(ours::AllocationProp) == sizeof(CUmemAllocationProp));
static_assert(offsetof(ours::AllocationProp, type) == offsetof(CUmemAllocationProp, type));
static_assert(offsetof(ours::AllocationProp, requested_handle_types) == offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(ours::AllocationProp, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(ours::AllocationProp, win32_handle_meta_data) == offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(ours::AllocationProp, alloc_flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(ours::Location) == sizeof(CUmemLocation) && offsetof(ours::Location, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(ours::AccessDesc) == sizeof(CUmemAccessDesc));
static_assert(offsetof(ours::AccessDesc, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(ours::Uuid) == sizeof(CUuuid));
static_assert(std::is_same_v<ours::Address, CUdeviceptr> && std::is_same_v<ours::DeviceOrdinal, CUdevice>);
static_assert(std::is_same_v<ours::Allocation, CUmemGenericAllocationHandle>);
static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kAllocationTypePinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(ours::kHandleTypePosixFileDescriptor == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(ours::kLocationTypeDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(ours::kAccessFlagsProtReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(ours::kAllocGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(ours::kMemHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(ours::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(ours::kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(ours::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
"""


def cuda_headers() -> list[Path]:
    """The folders of every cuda.h at hand: triton brings one along, a CUDA toolkit another."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(place) / "backends/nvidia/include" for place in (triton and triton.submodule_search_locations) or ()
    ]
    return [folder for folder in (*folders, Path("/usr/local/cuda/include")) if (folder / "cuda.h").exists()]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_abi_is_that_of_cuda_h(tmp_path: Path) -> None:
    folders = cuda_headers()
    if not folders:
        pytest.skip("no cuda.h here")
    source = tmp_path / "compare.cpp"
    source.write_text(COMPARISON)
    for folder in folders:
        command = ["g++", "-std=c++20", "-fsyntax-only", f"-I{CSRC}", "-isystem", str(folder), str(source)]
        compiled = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert compiled.returncode == 0, f"{folder}: {compiled.stderr}"
