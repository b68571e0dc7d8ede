#include "memory.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <system_error>

#include "chunk.hpp"

namespace stoker {

namespace {

// The last one keeps holders of a descriptor from adding more, which could bar a later owner from writing.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

}  // namespace

void throw_errno(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

void throw_errno(const char* what) { throw_errno(errno, what); }

Fd::~Fd() {
    if (fd_ >= 0) ::close(fd_);
}

Mapping::~Mapping() {
    if (address_ != nullptr) ::munmap(address_, size_);
}

Mapping reserve(std::size_t size) {
    const std::size_t wide = size + kHugeBytes;
    void* const mapped = ::mmap(nullptr, wide, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw_errno("mmap");
    auto* const start = static_cast<std::byte*>(mapped);
    const std::size_t head = (kHugeBytes - reinterpret_cast<std::uintptr_t>(start) % kHugeBytes) % kHugeBytes;
    if (head > 0) ::munmap(start, head);
    ::munmap(start + head + size, wide - head - size);
    return Mapping(start + head, size);
}

Mapping map_shared(int fd, std::size_t size) {
    void* const mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) throw_errno("mmap");
    return Mapping(static_cast<std::byte*>(mapped), size);
}

Fd create_sealed(const char* name, std::size_t size, unsigned flags) {
    Fd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
    if (fd.get() < 0) throw_errno("memfd_create");
    // Others get it by descriptor; no other user may reopen it, for writing say, through /proc.
    if (::fchmod(fd.get(), 0600) != 0) throw_errno("fchmod");
    if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) throw_errno("ftruncate");
    if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) throw_errno("fcntl(F_ADD_SEALS)");
    return fd;
}

std::size_t sealed_size(int fd) {
    struct stat status{};
    if (::fstat(fd, &status) != 0) throw_errno("fstat");
    const int seals = ::fcntl(fd, F_GET_SEALS);  // EINVAL for what is no memfd
    if (seals < 0 || (seals & kSeals) != kSeals) throw std::invalid_argument("not a memfd of fixed size");
    return static_cast<std::size_t>(status.st_size);
}

Fd duplicate(int fd) {
    Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (copy.get() < 0) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    return copy;
}

Fd create_event() {
    Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (fd.get() < 0) throw_errno("eventfd");
    return fd;
}

int advise(std::byte* address, std::size_t size, int advice) {
    while (::madvise(address, size, advice) != 0) {
        if (errno != EINTR) return errno;
    }
    return 0;
}

Deadline deadline_after(double timeout_s) {
    constexpr double year_s = 365.0 * 24 * 3600;
    const double bounded_s = timeout_s > 0 ? std::min(timeout_s, year_s) : 0.0;
    return std::chrono::steady_clock::now() +
           std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(bounded_s));
}

}  // namespace stoker
