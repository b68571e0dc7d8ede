// The CUDA driver, found at run time: one build serves machines with and without a GPU. Nothing is linked.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/abi.hpp"
#include "memory.hpp"

namespace stoker::cuda {

/// A call of the driver failed: "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY". code 0: there is no driver to call.
class Error : public std::runtime_error {
   public:
    Error(Result failed, const std::string& text) : std::runtime_error(text), code(failed) {}
    const Result code;
};

/// The driver, loaded and initialised by the first call. Throws Error, each time, while that fails.
const Driver& driver();

/// Tests only: what driver() opens instead of libcuda.so.1. To be called before driver().
void use_library(const char* path);

/// Throws Error unless `result` is kSuccess. call: the symbol's name.
void check(Result result, const char* call);

struct Availability {
    bool usable;
    std::string reason;  // why not; empty if usable
};

/// Whether there is a driver with at least one device.
Availability availability();

/// Which devices there are, by ordinal. Makes no context. Throws Error.
std::vector<Uuid> devices();

struct Device {
    int ordinal;
    Uuid uuid;
    ContextHandle* context;  // the primary one, which torch uses as well
};

/// The device with its context, which is made by the first call and stays for good: making one takes longer than many a
/// load. Throws Error.
const Device& device_of(int ordinal);

/// Makes a device's context the calling thread's while this lives.
class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
};

/// Device memory in this process's address space, outside every allocator, backed by something with a descriptor.
class DeviceMapping {
   public:
    /// New memory of at least `bytes`, and its descriptor, close-on-exec, in `fd`.
    static DeviceMapping create(const Device& device, std::size_t bytes, Fd& fd);
    /// The memory behind another process's descriptor, which stays the caller's.
    static DeviceMapping attach(const Device& device, std::size_t bytes, int fd);
    /// Waits for the device first: what still runs may use the memory.
    ~DeviceMapping();
    DeviceMapping(DeviceMapping&& other) noexcept;
    DeviceMapping& operator=(DeviceMapping&&) = delete;

    Address address() const { return address_; }
    const Device& device() const { return device_; }

   private:
    DeviceMapping(const Device& device, std::size_t bytes);
    void map(Allocation handle);

    const Device& device_;
    std::size_t bytes_;  // a multiple of the granularity
    Address address_ = 0;
    bool mapped_ = false;
};

/// Pins host memory for fast copies to every device, until the last copy of it is gone: for Pool::set_on_warm. Thread safe.
/// A refusal throws nothing, as memory that is not pinned works too: pinned() tells of it.
std::function<void(std::byte* memory, std::size_t bytes)> pinner();

struct Pinned {
    std::size_t bytes;        // pinned now, by this process
    std::string reason;  // of the last refusal, else empty
};

Pinned pinned();

}  // namespace stoker::cuda
