#include "uring.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

// Newer than some systems' headers; a kernel that lacks one refuses it.
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace stoker {
namespace {

// Best first. Completions are worked off when we ask for them, not by interrupting whatever runs.
constexpr std::array<std::uint32_t, 3> kSetupFlags = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_COOP_TASKRUN,
    0,
};

// A descriptor, close-on-exec, or -1 and errno.
int setup(std::uint32_t entries, io_uring_params& params) {
    for (std::uint32_t flags : kSetupFlags) {
        params = {};
        params.flags = flags | IORING_SETUP_R_DISABLED;
        long fd = syscall(SYS_io_uring_setup, entries, &params);
        if (fd >= 0) return static_cast<int>(fd);
        if (errno != EINVAL) break;
    }
    return -1;
}

// io_uring_rsrc_register as of Linux 5.19: older headers do not name its flags.
struct EmptyTable {
    std::uint32_t count;
    std::uint32_t flags = 1;  // IORING_RSRC_REGISTER_SPARSE
    std::uint64_t reserved = 0;
    std::uint64_t data = 0;
    std::uint64_t tags = 0;
};

template <class T>
T* at(void* base, std::uint32_t offset) {
    return reinterpret_cast<T*>(static_cast<std::byte*>(base) + offset);
}

}  // namespace

Ring::Ring(std::uint32_t entries) {
    io_uring_params params;
    fd_ = setup(entries, params);
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
    try {
        map(params);
        if (!can_read()) throw std::system_error(EOPNOTSUPP, std::generic_category(), "io_uring");
    } catch (...) {
        release();
        throw;
    }
}

Ring::~Ring() { release(); }

void Ring::map(const io_uring_params& params) {
    // Both came with Linux 5.5: one mapping for both rings, and completions that are never dropped.
    constexpr std::uint32_t kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;
    if ((params.features & kNeeded) != kNeeded) {
        throw std::system_error(EOPNOTSUPP, std::generic_category(), "io_uring");
    }

    auto map_at = [this](std::size_t bytes, off_t offset) {
        void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
        if (address == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of an io_uring");
        return address;
    };
    rings_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(std::uint32_t),
                            params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    rings_ = map_at(rings_bytes_, IORING_OFF_SQ_RING);
    sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    sqes_ = static_cast<io_uring_sqe*>(map_at(sqes_bytes_, IORING_OFF_SQES));

    sq_head_ = at<std::atomic<std::uint32_t>>(rings_, params.sq_off.head);
    sq_tail_ = at<std::atomic<std::uint32_t>>(rings_, params.sq_off.tail);
    sq_mask_ = *at<std::uint32_t>(rings_, params.sq_off.ring_mask);
    sq_array_ = at<std::uint32_t>(rings_, params.sq_off.array);
    cq_head_ = at<std::atomic<std::uint32_t>>(rings_, params.cq_off.head);
    cq_tail_ = at<std::atomic<std::uint32_t>>(rings_, params.cq_off.tail);
    cq_mask_ = *at<std::uint32_t>(rings_, params.cq_off.ring_mask);
    cqes_ = at<io_uring_cqe>(rings_, params.cq_off.cqes);
}

bool Ring::can_read() {
    constexpr unsigned kOps = 256;
    std::vector<std::byte> room(sizeof(io_uring_probe) + kOps * sizeof(io_uring_probe_op));
    auto* probe = reinterpret_cast<io_uring_probe*>(room.data());
    if (register_with(IORING_REGISTER_PROBE, probe, kOps) != 0) return false;
    return probe->last_op >= IORING_OP_READ && (probe->ops[IORING_OP_READ].flags & IO_URING_OP_SUPPORTED) != 0;
}

void Ring::release() {
    if (sqes_ != nullptr) munmap(sqes_, sqes_bytes_);
    if (rings_ != nullptr) munmap(rings_, rings_bytes_);
    close(fd_);
}

void Ring::enable() {
    int error = register_with(IORING_REGISTER_ENABLE_RINGS, nullptr, 0);
    if (error != 0) throw std::system_error(error, std::generic_category(), "io_uring");
}

io_uring_sqe& Ring::next() {
    std::uint32_t index = tail_++ & sq_mask_;
    sq_array_[index] = index;
    std::memset(&sqes_[index], 0, sizeof(io_uring_sqe));
    return sqes_[index];
}

void Ring::submit_and_wait() {
    sq_tail_->store(tail_, std::memory_order_release);
    std::uint32_t count = tail_ - sq_head_->load(std::memory_order_acquire);
    if (syscall(SYS_io_uring_enter, fd_, count, 1, IORING_ENTER_GETEVENTS, nullptr, 0) >= 0 || errno == EINTR) return;
    if (errno != EAGAIN && errno != EBUSY) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the kernel lacks memory for a request just now
}

bool Ring::pop(io_uring_cqe& completion) {
    std::uint32_t head = cq_head_->load(std::memory_order_relaxed);
    if (head == cq_tail_->load(std::memory_order_acquire)) return false;
    completion = cqes_[head & cq_mask_];
    cq_head_->store(head + 1, std::memory_order_release);
    return true;
}

int Ring::register_buffers(std::uint32_t count) {
    EmptyTable table{.count = count};
    return register_with(IORING_REGISTER_BUFFERS2, &table, sizeof table);
}

int Ring::register_buffer(std::uint32_t slot, std::byte* address, std::size_t size) {
    iovec buffer{.iov_base = address, .iov_len = size};
    io_uring_rsrc_update2 update{};
    update.offset = slot;
    update.data = reinterpret_cast<std::uint64_t>(&buffer);
    update.nr = 1;
    return register_with(IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
}

int Ring::register_with(unsigned opcode, void* argument, unsigned count) {
    return syscall(SYS_io_uring_register, fd_, opcode, argument, count) < 0 ? errno : 0;
}

int io_uring_errno() {
    try {
        Ring ring(1);
        return 0;
    } catch (const std::system_error& error) {
        return error.code().value();
    }
}

}  // namespace stoker
