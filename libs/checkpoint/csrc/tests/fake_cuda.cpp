// A stand-in for libcuda.so.1, for tests on machines without a GPU. It checks what a driver would refuse.
//
// Device memory is memfds: an exported handle is a descriptor of one, and a mapping of it that cuMemSetAccess has not
// opened cannot be touched. Every stream is a thread, and a copy takes a moment, so that whoever does not wait sees old
// bytes. There are two devices. A thread without a current context is refused, as in the driver.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/abi.hpp"

namespace {

using namespace stoker::cuda;

constexpr Result kInvalidValue = 1;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidContext = 201;
constexpr Result kAlreadyRegistered = 712;
constexpr Result kNotRegistered = 713;
constexpr std::size_t kGranularity = std::size_t{2} << 20;
constexpr int kDevices = 2;
constexpr auto kCopyTime = std::chrono::microseconds(200);

std::mutex mutex;  // guards all that follows
std::map<Allocation, int> allocations;  // to memfds
Allocation next_allocation = 1;
std::map<Address, std::size_t> reserved;
std::map<Address, std::size_t> mapped;
std::map<void*, std::size_t> registered;
int contexts[kDevices] = {};
int streams = 0;
int events = 0;
std::string failing_call;  // fails, with failing_code, after failing_after successes
int failing_after = 0;
Result failing_code = 0;

thread_local std::vector<ContextHandle*> current;

Result injected(const char* call) {
    const std::lock_guard guard(mutex);
    return failing_call == call && failing_after-- <= 0 ? failing_code : kSuccess;
}

std::byte* pointer(Address address) { return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address)); }

bool is_ours(const AllocationProp& prop) {
    return prop.type == kAllocationTypePinned && prop.requested_handle_types == kHandleTypePosixFileDescriptor &&
           prop.location.type == kLocationTypeDevice && prop.location.id >= 0 && prop.location.id < kDevices &&
           prop.win32_handle_meta_data == nullptr;
}

}  // namespace

#define REFUSE_IF(condition, code) \
    if (condition) return code
#define ENTER(call)                                               \
    if (const Result code = injected(call); code != kSuccess) return code; \
    REFUSE_IF(current.empty(), kInvalidContext)

namespace stoker::cuda {

struct ContextHandle {
    int device;
};

struct StreamHandle {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    std::uint64_t queued = 0;
    std::uint64_t done = 0;
    bool stop = false;
    std::thread thread{[this] { run(); }};

    void run() {
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return stop || !queue.empty(); });
            if (queue.empty()) return;
            auto work = std::move(queue.front());
            queue.pop_front();
            lock.unlock();
            work();
            lock.lock();
            ++done;
            changed.notify_all();
        }
    }

    void push(std::function<void()> work) {
        const std::lock_guard guard(mutex);
        queue.push_back(std::move(work));
        ++queued;
        changed.notify_all();
    }

    void wait(std::uint64_t until) {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return done >= until; });
    }
};

struct EventHandle {
    StreamHandle* stream = nullptr;
    std::uint64_t until = 0;
};

}  // namespace stoker::cuda

namespace {

ContextHandle primary[kDevices] = {{0}, {1}};

}  // namespace

extern "C" {

// What tests ask and set.

// The call succeeds `after` times more, then always fails with `code`. nullptr: none fails.
void fake_cuda_fail(const char* call, int after, Result code) {
    const std::lock_guard guard(mutex);
    failing_call = call != nullptr ? call : "";
    failing_after = after;
    failing_code = code;
}

// Things made and not unmade; contexts are kept for good.
int fake_cuda_live() {
    const std::lock_guard guard(mutex);
    return static_cast<int>(allocations.size() + reserved.size() + mapped.size() + registered.size()) + streams + events;
}

int fake_cuda_registered() {
    const std::lock_guard guard(mutex);
    return static_cast<int>(registered.size());
}

// The driver's calls.

Result cuInit(unsigned flags) {
    if (const Result code = injected("cuInit"); code != kSuccess) return code;
    return flags == 0 ? kSuccess : kInvalidValue;
}

Result cuGetErrorName(Result error, const char** name) {
    static const std::map<Result, const char*> names = {
        {1, "CUDA_ERROR_INVALID_VALUE"},          {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {100, "CUDA_ERROR_NO_DEVICE"},            {101, "CUDA_ERROR_INVALID_DEVICE"},
        {201, "CUDA_ERROR_INVALID_CONTEXT"},      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    };
    const auto found = names.find(error);
    *name = found != names.end() ? found->second : nullptr;
    return found != names.end() ? kSuccess : kInvalidValue;
}

Result cuDeviceGetCount(int* count) {
    *count = kDevices;
    return injected("cuDeviceGetCount");
}

Result cuDeviceGet(DeviceOrdinal* device, int ordinal) {
    REFUSE_IF(ordinal < 0 || ordinal >= kDevices, kInvalidDevice);
    *device = ordinal;
    return kSuccess;
}

Result cuDeviceGetUuid_v2(Uuid* uuid, DeviceOrdinal device) {
    uuid->bytes.fill(static_cast<unsigned char>(0x40 + device));
    return kSuccess;
}

Result cuDevicePrimaryCtxRetain(ContextHandle** context, DeviceOrdinal device) {
    if (const Result code = injected("cuDevicePrimaryCtxRetain"); code != kSuccess) return code;
    const std::lock_guard guard(mutex);
    ++contexts[device];
    *context = &primary[device];
    return kSuccess;
}

Result cuCtxPushCurrent_v2(ContextHandle* context) {
    const std::lock_guard guard(mutex);
    REFUSE_IF(context == nullptr || contexts[context->device] == 0, kInvalidContext);
    current.push_back(context);
    return kSuccess;
}

Result cuCtxPopCurrent_v2(ContextHandle** context) {
    REFUSE_IF(current.empty(), kInvalidContext);
    *context = current.back();
    current.pop_back();
    return kSuccess;
}

Result cuCtxSynchronize() {
    ENTER("cuCtxSynchronize");
    return kSuccess;
}

Result cuMemGetAllocationGranularity(std::size_t* bytes, const AllocationProp* prop, int kind) {
    REFUSE_IF(!is_ours(*prop) || kind != kAllocGranularityMinimum, kInvalidValue);
    *bytes = kGranularity;
    return kSuccess;
}

Result cuMemCreate(Allocation* handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags) {
    ENTER("cuMemCreate");
    REFUSE_IF(!is_ours(*prop) || flags != 0 || bytes == 0 || bytes % kGranularity != 0, kInvalidValue);
    const int fd = memfd_create("fake-device", MFD_CLOEXEC);
    REFUSE_IF(fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0, 2);
    const std::lock_guard guard(mutex);
    *handle = next_allocation++;
    allocations[*handle] = fd;
    return kSuccess;
}

Result cuMemRelease(Allocation handle) {
    const std::lock_guard guard(mutex);
    const auto found = allocations.find(handle);
    REFUSE_IF(found == allocations.end(), kInvalidValue);
    close(found->second);
    allocations.erase(found);
    return kSuccess;
}

Result cuMemAddressReserve(Address* address, std::size_t bytes, std::size_t, Address, unsigned long long flags) {
    ENTER("cuMemAddressReserve");
    REFUSE_IF(flags != 0 || bytes == 0 || bytes % kGranularity != 0, kInvalidValue);
    void* const memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REFUSE_IF(memory == MAP_FAILED, 2);
    const std::lock_guard guard(mutex);
    *address = reinterpret_cast<std::uintptr_t>(memory);
    reserved[*address] = bytes;
    return kSuccess;
}

Result cuMemAddressFree(Address address, std::size_t bytes) {
    const std::lock_guard guard(mutex);
    const auto found = reserved.find(address);
    REFUSE_IF(found == reserved.end() || found->second != bytes || mapped.count(address) > 0, kInvalidValue);
    munmap(pointer(address), bytes);
    reserved.erase(found);
    return kSuccess;
}

Result cuMemMap(Address address, std::size_t bytes, std::size_t offset, Allocation handle, unsigned long long flags) {
    ENTER("cuMemMap");
    const std::lock_guard guard(mutex);
    const auto allocation = allocations.find(handle);
    const auto range = reserved.find(address);
    REFUSE_IF(allocation == allocations.end() || range == reserved.end() || range->second != bytes, kInvalidValue);
    struct stat status {};
    fstat(allocation->second, &status);
    REFUSE_IF(offset != 0 || flags != 0 || static_cast<std::size_t>(status.st_size) != bytes, kInvalidValue);
    void* const memory = mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, allocation->second, 0);
    REFUSE_IF(memory == MAP_FAILED, 2);
    mapped[address] = bytes;
    return kSuccess;
}

Result cuMemUnmap(Address address, std::size_t bytes) {
    ENTER("cuMemUnmap");
    const std::lock_guard guard(mutex);
    const auto found = mapped.find(address);
    REFUSE_IF(found == mapped.end() || found->second != bytes, kInvalidValue);
    mmap(pointer(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    mapped.erase(found);
    return kSuccess;
}

Result cuMemSetAccess(Address address, std::size_t bytes, const AccessDesc* access, std::size_t count) {
    ENTER("cuMemSetAccess");
    REFUSE_IF(count != 1 || access->location.type != kLocationTypeDevice || access->location.id != current.back()->device ||
                  access->flags != kAccessFlagsProtReadWrite,
              kInvalidValue);
    const std::lock_guard guard(mutex);
    REFUSE_IF(mapped.count(address) == 0 || mapped[address] != bytes, kInvalidValue);
    return mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) == 0 ? kSuccess : kInvalidValue;
}

Result cuMemExportToShareableHandle(void* shareable, Allocation handle, int kind, unsigned long long flags) {
    ENTER("cuMemExportToShareableHandle");
    const std::lock_guard guard(mutex);
    const auto found = allocations.find(handle);
    REFUSE_IF(found == allocations.end() || kind != kHandleTypePosixFileDescriptor || flags != 0, kInvalidValue);
    const int fd = dup(found->second);
    std::memcpy(shareable, &fd, sizeof fd);
    return kSuccess;
}

Result cuMemImportFromShareableHandle(Allocation* handle, void* shareable, int kind) {
    ENTER("cuMemImportFromShareableHandle");
    const int fd = fcntl(static_cast<int>(reinterpret_cast<std::uintptr_t>(shareable)), F_DUPFD_CLOEXEC, 0);
    REFUSE_IF(fd < 0 || kind != kHandleTypePosixFileDescriptor, kInvalidValue);
    const std::lock_guard guard(mutex);
    *handle = next_allocation++;
    allocations[*handle] = fd;
    return kSuccess;
}

Result cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned flags) {
    ENTER("cuMemHostRegister");
    const std::lock_guard guard(mutex);
    REFUSE_IF(flags != kMemHostRegisterPortable || bytes == 0, kInvalidValue);
    return registered.emplace(memory, bytes).second ? kSuccess : kAlreadyRegistered;
}

Result cuMemHostUnregister(void* memory) {
    ENTER("cuMemHostUnregister");
    const std::lock_guard guard(mutex);
    return registered.erase(memory) == 1 ? kSuccess : kNotRegistered;
}

Result cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, StreamHandle* stream) {
    ENTER("cuMemcpyHtoDAsync");
    {
        const std::lock_guard guard(mutex);
        auto range = mapped.upper_bound(to);
        REFUSE_IF(range == mapped.begin(), kInvalidValue);
        --range;
        REFUSE_IF(to - range->first > range->second || bytes > range->second - (to - range->first), kInvalidValue);
    }
    stream->push([=] {
        std::this_thread::sleep_for(kCopyTime);
        std::memcpy(pointer(to), from, bytes);
    });
    return kSuccess;
}

Result cuStreamCreate(StreamHandle** stream, unsigned flags) {
    ENTER("cuStreamCreate");
    REFUSE_IF(flags != kStreamNonBlocking, kInvalidValue);
    *stream = new StreamHandle;
    const std::lock_guard guard(mutex);
    ++streams;
    return kSuccess;
}

Result cuStreamSynchronize(StreamHandle* stream) {
    ENTER("cuStreamSynchronize");
    std::uint64_t queued = 0;
    {
        const std::lock_guard guard(stream->mutex);
        queued = stream->queued;
    }
    stream->wait(queued);
    return kSuccess;
}

Result cuStreamDestroy_v2(StreamHandle* stream) {
    {
        const std::lock_guard guard(stream->mutex);
        if (stream->done < stream->queued) std::abort();  // the driver would go on with it behind the caller's back
        stream->stop = true;
        stream->changed.notify_all();
    }
    stream->thread.join();
    delete stream;
    const std::lock_guard guard(mutex);
    --streams;
    return kSuccess;
}

Result cuEventCreate(EventHandle** event, unsigned flags) {
    ENTER("cuEventCreate");
    REFUSE_IF(flags != (kEventBlockingSync | kEventDisableTiming), kInvalidValue);
    *event = new EventHandle;
    const std::lock_guard guard(mutex);
    ++events;
    return kSuccess;
}

Result cuEventRecord(EventHandle* event, StreamHandle* stream) {
    ENTER("cuEventRecord");
    const std::lock_guard guard(stream->mutex);
    event->stream = stream;
    event->until = stream->queued;
    return kSuccess;
}

Result cuEventSynchronize(EventHandle* event) {
    ENTER("cuEventSynchronize");
    if (event->stream != nullptr) event->stream->wait(event->until);
    return kSuccess;
}

Result cuEventDestroy_v2(EventHandle* event) {
    delete event;
    const std::lock_guard guard(mutex);
    --events;
    return kSuccess;
}

}  // extern "C"
