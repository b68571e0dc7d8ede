// Descriptors and mappings that clean up after themselves, sealed memfds, bounded waits.
//
// Functions of the operating system that fail throw std::system_error with the errno (OSError in Python).
#pragma once

#include <chrono>
#include <cstddef>
#include <utility>

namespace stoker {

/// Throws std::system_error with the current errno.
[[noreturn]] void throw_errno(const char* what);
[[noreturn]] void throw_errno(int error, const char* what);

/// Owns a file descriptor. -1: none.
class Fd {
   public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Fd();

    int get() const { return fd_; }
    int release() { return std::exchange(fd_, -1); }

   private:
    int fd_ = -1;
};

/// Owns a range of addresses, whatever is mapped in it.
class Mapping {
   public:
    Mapping() = default;
    Mapping(std::byte* address, std::size_t size) : address_(address), size_(size) {}
    Mapping(Mapping&& other) noexcept
        : address_(std::exchange(other.address_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Mapping& operator=(Mapping&& other) noexcept {
        std::swap(address_, other.address_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~Mapping();

    std::byte* address() const { return address_; }
    std::size_t size() const { return size_; }

   private:
    std::byte* address_ = nullptr;
    std::size_t size_ = 0;
};

/// Addresses that nothing can touch yet, aligned to kHugeBytes, for mmap(MAP_FIXED) inside.
Mapping reserve(std::size_t size);

/// The whole of `fd`, shared and writable. Alignment: a page.
Mapping map_shared(int fd, std::size_t size);

/// A new memfd, close-on-exec, of a size that nobody can change any more: whoever maps it never meets SIGBUS.
///
/// flags: more of memfd_create's, such as MFD_HUGETLB.
Fd create_sealed(const char* name, std::size_t size, unsigned flags = 0);

/// The size of a memfd made by create_sealed. Throws std::invalid_argument for any other file.
std::size_t sealed_size(int fd);

/// Another descriptor of the same open file, close-on-exec.
Fd duplicate(int fd);

/// A new eventfd of 0, close-on-exec, that nobody blocks on.
Fd create_event();

/// madvise, repeated when a signal interrupts it; 0 or the errno.
int advise(std::byte* address, std::size_t size, int advice);

using Deadline = std::chrono::steady_clock::time_point;

/// From now. Negative and NaN mean now; more than a year means a year, so that no arithmetic overflows.
Deadline deadline_after(double timeout_s);

}  // namespace stoker
