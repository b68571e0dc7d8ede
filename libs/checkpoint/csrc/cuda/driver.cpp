#include "cuda/driver.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace stoker::cuda {
namespace {

const char* library = "libcuda.so.1";

Driver load() {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        throw Error(0, std::string("no CUDA driver: ") + dlerror());
    }
    // Never closed: the driver's own threads outlive every use of it.
    Driver found{};
#define STOKER_CUDA_FIND(name, parameters) \
    found.name = reinterpret_cast<Result(*) parameters>(dlsym(handle, #name)); \
    if (found.name == nullptr) { \
        throw Error(0, "the CUDA driver is too old: it has no " #name); \
    }
    STOKER_CUDA_CALLS(STOKER_CUDA_FIND)
#undef STOKER_CUDA_FIND
    if (const Result result = found.cuInit(0); result != kSuccess) {
        const char* name = nullptr;
        found.cuGetErrorName(result, &name);
        throw Error(result, std::string("cuInit: ") + (name != nullptr ? name : std::to_string(result).c_str()));
    }
    return found;
}

AllocationProp properties(int ordinal) {
    AllocationProp prop{};
    prop.type = kAllocationTypePinned;
    prop.requested_handle_types = kHandleTypePosixFileDescriptor;
    prop.location = {kLocationTypeDevice, ordinal};
    return prop;
}

struct Release {
    Allocation handle;
    ~Release() { driver().cuMemRelease(handle); }
};

}  // namespace

void use_library(const char* path) { library = path; }

const Driver& driver() {
    static const Driver loaded = load();
    return loaded;
}

void check(Result result, const char* call) {
    if (result == kSuccess) return;
    const char* name = nullptr;
    driver().cuGetErrorName(result, &name);
    throw Error(result, std::string(call) + ": " + (name != nullptr ? name : std::to_string(result).c_str()));
}

Availability availability() {
    try {
        int count = 0;
        check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
        return count > 0 ? Availability{true, ""} : Availability{false, "the CUDA driver sees no device"};
    } catch (const Error& error) {
        return {false, error.what()};
    }
}

std::vector<Uuid> devices() {
    int count = 0;
    check(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
    std::vector<Uuid> found(static_cast<std::size_t>(count));
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        DeviceOrdinal handle = 0;
        check(driver().cuDeviceGet(&handle, ordinal), "cuDeviceGet");
        check(driver().cuDeviceGetUuid_v2(&found[static_cast<std::size_t>(ordinal)], handle), "cuDeviceGetUuid");
    }
    return found;
}

const Device& device_of(int ordinal) {
    // Never destroyed: pools and rings may go after static objects do.
    static std::mutex& mutex = *new std::mutex;
    static auto& known = *new std::map<int, Device>;
    const std::lock_guard guard(mutex);
    if (const auto found = known.find(ordinal); found != known.end()) return found->second;
    DeviceOrdinal handle = 0;
    Device device{.ordinal = ordinal, .uuid = {}, .context = nullptr};
    check(driver().cuDeviceGet(&handle, ordinal), "cuDeviceGet");
    check(driver().cuDeviceGetUuid_v2(&device.uuid, handle), "cuDeviceGetUuid");
    check(driver().cuDevicePrimaryCtxRetain(&device.context, handle), "cuDevicePrimaryCtxRetain");
    return known.emplace(ordinal, device).first->second;
}

Current::Current(const Device& device) { check(driver().cuCtxPushCurrent_v2(device.context), "cuCtxPushCurrent"); }

Current::~Current() {
    ContextHandle* popped = nullptr;
    driver().cuCtxPopCurrent_v2(&popped);
}

DeviceMapping::DeviceMapping(const Device& device, std::size_t bytes)
    : device_(device), bytes_(bytes) {
    const AllocationProp prop = properties(device_.ordinal);
    std::size_t granularity = 0;
    check(driver().cuMemGetAllocationGranularity(&granularity, &prop, kAllocGranularityMinimum),
          "cuMemGetAllocationGranularity");
    bytes_ = (bytes + granularity - 1) / granularity * granularity;
}

DeviceMapping::DeviceMapping(DeviceMapping&& other) noexcept
    : device_(other.device_),
      bytes_(other.bytes_),
      address_(std::exchange(other.address_, 0)),
      mapped_(std::exchange(other.mapped_, false)) {}

DeviceMapping DeviceMapping::create(const Device& device, std::size_t bytes, Fd& fd) {
    const Current current(device);
    DeviceMapping mapping(device, bytes);
    const AllocationProp prop = properties(mapping.device_.ordinal);
    Allocation handle = 0;
    check(driver().cuMemCreate(&handle, mapping.bytes_, &prop, 0), "cuMemCreate");
    const Release release{handle};  // the mapping and the descriptor keep the memory
    mapping.map(handle);
    int exported = -1;
    check(driver().cuMemExportToShareableHandle(&exported, handle, kHandleTypePosixFileDescriptor, 0),
          "cuMemExportToShareableHandle");
    fd = Fd(exported);
    if (fcntl(exported, F_SETFD, FD_CLOEXEC) != 0) throw_errno("fcntl");
    return mapping;
}

DeviceMapping DeviceMapping::attach(const Device& device, std::size_t bytes, int fd) {
    const Current current(device);
    DeviceMapping mapping(device, bytes);
    Allocation handle = 0;
    void* shareable = reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd));
    check(driver().cuMemImportFromShareableHandle(&handle, shareable, kHandleTypePosixFileDescriptor),
          "cuMemImportFromShareableHandle");
    const Release release{handle};
    mapping.map(handle);
    return mapping;
}

void DeviceMapping::map(Allocation handle) {
    check(driver().cuMemAddressReserve(&address_, bytes_, 0, 0, 0), "cuMemAddressReserve");
    check(driver().cuMemMap(address_, bytes_, 0, handle, 0), "cuMemMap");
    mapped_ = true;
    const AccessDesc access{{kLocationTypeDevice, device_.ordinal}, kAccessFlagsProtReadWrite};
    check(driver().cuMemSetAccess(address_, bytes_, &access, 1), "cuMemSetAccess");
}

DeviceMapping::~DeviceMapping() {
    if (address_ == 0) return;
    try {
        const Current current(device_);
        if (mapped_) {
            // A device that cannot be waited for may still use the memory: rather leave it mapped.
            check(driver().cuCtxSynchronize(), "cuCtxSynchronize");
            check(driver().cuMemUnmap(address_, bytes_), "cuMemUnmap");
        }
        driver().cuMemAddressFree(address_, bytes_);
    } catch (const Error&) {
    }
}

namespace {

std::mutex pinned_mutex;
Pinned pinned_now;

class Pins {
   public:
    Pins() = default;
    Pins(const Pins&) = delete;
    Pins& operator=(const Pins&) = delete;

    void add(std::byte* memory, std::size_t bytes) {
        const std::lock_guard guard(pinned_mutex);
        if (refused_) return;
        try {
            const Current current(device_of(0));  // portable: with one context it is pinned for all devices
            check(driver().cuMemHostRegister_v2(memory, bytes, kMemHostRegisterPortable), "cuMemHostRegister");
            pins_.emplace_back(memory, bytes);
            pinned_now.bytes += bytes;
        } catch (const Error& error) {
            refused_ = true;  // as the next ones would be
            pinned_now.reason = error.what();
        }
    }

    ~Pins() {
        if (pins_.empty()) return;
        const std::lock_guard guard(pinned_mutex);
        try {
            const Current current(device_of(0));
            for (const auto& [memory, bytes] : pins_) {
                driver().cuMemHostUnregister(memory);
                pinned_now.bytes -= bytes;
            }
        } catch (const Error&) {  // the driver is gone, and so is what it pinned
        }
    }

   private:
    std::vector<std::pair<std::byte*, std::size_t>> pins_;
    bool refused_ = false;
};

}  // namespace

std::function<void(std::byte*, std::size_t)> pinner() {
    return [pins = std::make_shared<Pins>()](std::byte* memory, std::size_t bytes) { pins->add(memory, bytes); };
}

Pinned pinned() {
    const std::lock_guard guard(pinned_mutex);
    return pinned_now;
}

}  // namespace stoker::cuda
