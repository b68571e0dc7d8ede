// The CUDA driver's binary interface, as much of it as the loader needs. No CUDA header is used.
//
// Types, constants and prototypes are those of the CUDA Driver API reference manual, sections "Data types used by CUDA
// driver" (enums, CUmemAllocationProp, CUmemAccessDesc, CUuuid), "Device Management", "Primary Context Management",
// "Context Management", "Memory Management", "Virtual Memory Management", "Stream Management" and "Event Management".
// Where that manual's name is a macro for a newer symbol (`cuMemcpyHtoDAsync` for `cuMemcpyHtoDAsync_v2`), the symbol is
// named here. tests/native/test_cuda_abi.py compares all of it with a cuda.h where there is one.
#pragma once

#include <array>
#include <cstddef>

namespace stoker::cuda {

using Result = int;  // CUresult
using DeviceOrdinal = int;  // CUdevice
using Address = unsigned long long;  // CUdeviceptr
using Allocation = unsigned long long;  // CUmemGenericAllocationHandle
struct ContextHandle;  // behind CUcontext
struct StreamHandle;  // behind CUstream
struct EventHandle;  // behind CUevent

inline constexpr Result kSuccess = 0;
inline constexpr int kAllocationTypePinned = 1;
inline constexpr int kHandleTypePosixFileDescriptor = 1;
inline constexpr int kLocationTypeDevice = 1;
inline constexpr int kAccessFlagsProtReadWrite = 3;
inline constexpr int kAllocGranularityMinimum = 0;
inline constexpr unsigned kMemHostRegisterPortable = 1;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;

struct Location {  // CUmemLocation
    int type;
    int id;
};

struct AllocationProp {  // CUmemAllocationProp
    int type;
    int requested_handle_types;
    Location location;
    void* win32_handle_meta_data;
    struct {
        unsigned char compression_type;
        unsigned char gpu_direct_rdma_capable;
        unsigned short usage;
        unsigned char reserved[4];
    } alloc_flags;
};

struct AccessDesc {  // CUmemAccessDesc
    Location location;
    int flags;
};

struct Uuid {  // CUuuid
    std::array<unsigned char, 16> bytes;
    bool operator==(const Uuid&) const = default;
};

static_assert(sizeof(Location) == 8);
static_assert(sizeof(AllocationProp) == 32);
static_assert(offsetof(AllocationProp, location) == 8 && offsetof(AllocationProp, win32_handle_meta_data) == 16);
static_assert(offsetof(AllocationProp, alloc_flags) == 24);
static_assert(sizeof(AccessDesc) == 12 && offsetof(AccessDesc, flags) == 8);
static_assert(sizeof(Uuid) == 16);

// X(symbol, parameters). Every one returns CUresult.
#define STOKER_CUDA_CALLS(X) \
    X(cuInit, (unsigned flags)) \
    X(cuGetErrorName, (Result error, const char** name)) \
    X(cuDeviceGetCount, (int* count)) \
    X(cuDeviceGet, (DeviceOrdinal* device, int ordinal)) \
    X(cuDeviceGetUuid_v2, (Uuid* uuid, DeviceOrdinal device)) \
    X(cuDevicePrimaryCtxRetain, (ContextHandle** context, DeviceOrdinal device)) \
    X(cuCtxPushCurrent_v2, (ContextHandle* context)) \
    X(cuCtxPopCurrent_v2, (ContextHandle** context)) \
    X(cuCtxSynchronize, ()) \
    X(cuMemGetAllocationGranularity, (std::size_t* bytes, const AllocationProp* prop, int kind)) \
    X(cuMemCreate, (Allocation* handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags)) \
    X(cuMemRelease, (Allocation handle)) \
    X(cuMemAddressReserve, (Address* address, std::size_t bytes, std::size_t alignment, Address hint, unsigned long long flags)) \
    X(cuMemAddressFree, (Address address, std::size_t bytes)) \
    X(cuMemMap, (Address address, std::size_t bytes, std::size_t offset, Allocation handle, unsigned long long flags)) \
    X(cuMemUnmap, (Address address, std::size_t bytes)) \
    X(cuMemSetAccess, (Address address, std::size_t bytes, const AccessDesc* access, std::size_t count)) \
    X(cuMemExportToShareableHandle, (void* shareable, Allocation handle, int kind, unsigned long long flags)) \
    X(cuMemImportFromShareableHandle, (Allocation* handle, void* shareable, int kind)) \
    X(cuMemHostRegister_v2, (void* memory, std::size_t bytes, unsigned flags)) \
    X(cuMemHostUnregister, (void* memory)) \
    X(cuMemcpyHtoDAsync_v2, (Address to, const void* from, std::size_t bytes, StreamHandle* stream)) \
    X(cuStreamCreate, (StreamHandle** stream, unsigned flags)) \
    X(cuStreamSynchronize, (StreamHandle* stream)) \
    X(cuStreamDestroy_v2, (StreamHandle* stream)) \
    X(cuEventCreate, (EventHandle** event, unsigned flags)) \
    X(cuEventRecord, (EventHandle* event, StreamHandle* stream)) \
    X(cuEventSynchronize, (EventHandle* event)) \
    X(cuEventDestroy_v2, (EventHandle* event))

struct Driver {
#define STOKER_CUDA_MEMBER(name, parameters) Result(*name) parameters;
    STOKER_CUDA_CALLS(STOKER_CUDA_MEMBER)
#undef STOKER_CUDA_MEMBER
};

}  // namespace stoker::cuda
