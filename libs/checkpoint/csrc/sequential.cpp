#include "sequential.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <stdexcept>

#include "chunk.hpp"
#include "memory.hpp"
#include "transfer.hpp"

namespace stoker {

namespace {

/// One block into `target`.
void read_block(int fd, std::byte* target, std::uint64_t offset, std::uint32_t size, std::uint64_t size_bytes) {
    Transfer transfer(offset, size, size_bytes);
    while (true) {
        std::byte* const rest = target + (transfer.offset() - offset);
        const ssize_t count = ::pread(fd, rest, transfer.remaining(), static_cast<off_t>(transfer.offset()));
        switch (transfer.on_result(count >= 0 ? count : -errno, true)) {
            case Transfer::Step::done:
                return;
            case Transfer::Step::more:
                break;
            case Transfer::Step::buffered:
                throw_errno(EINVAL, "O_DIRECT");
            case Transfer::Step::truncated:
                throw_errno(EIO, "the file is shorter");
            case Transfer::Step::failed:
                throw_errno(transfer.error(), "pread");
        }
    }
}

}  // namespace

double sequential_read(const std::string& path, std::uint64_t size_bytes, std::uint32_t block_bytes) {
    if (block_bytes == 0 || block_bytes % kAlignBytes != 0) {
        throw std::invalid_argument("block_bytes is no multiple of 4096");
    }
    const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
    if (fd.get() < 0) throw_errno("open");
    // On huge pages where they can be had, which doubles what some disks give, and populated before the clock starts.
    const Mapping target = reserve(block_bytes);
    if (::mprotect(target.address(), block_bytes, PROT_READ | PROT_WRITE) != 0) throw_errno("mprotect");
    advise(target.address(), block_bytes, MADV_HUGEPAGE);
    if (const int error = advise(target.address(), block_bytes, MADV_POPULATE_WRITE)) throw_errno(error, "madvise");

    const auto begin = std::chrono::steady_clock::now();
    for (std::uint64_t offset = 0; offset < size_bytes; offset += block_bytes) {
        read_block(fd.get(), target.address(), offset, block_bytes, size_bytes);
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace stoker
