// An io_uring by its three system calls. One thread uses a ring at a time; it is that thread's from enable() on.
#pragma once

#include <linux/io_uring.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace stoker {

class Ring {
   public:
    /// Room for `entries` submissions, and twice as many completions. Throws std::system_error (ENOSYS, EPERM, ENOMEM,
    /// EOPNOTSUPP if the kernel cannot read by ring).
    explicit Ring(std::uint32_t entries);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    /// Before the first submit, by the thread that will submit. Throws std::system_error.
    void enable();

    /// The next submission, zeroed. No more than `entries` of them before a submit.
    io_uring_sqe& next();

    /// Hands over what next() gave and waits for a completion; returns early if interrupted or if the kernel is short
    /// of memory, so call it in a loop. Throws std::system_error for what no retry mends.
    void submit_and_wait();

    /// Takes the oldest completion; false if there is none.
    bool pop(io_uring_cqe& completion);

    /// Memory that the kernel holds on to, for IORING_OP_READ_FIXED: a table of `count` empty slots (at most
    /// kBuffersMax), then what is in a slot. Both: 0 or errno (EINVAL before Linux 5.19, ENOMEM past RLIMIT_MEMLOCK).
    static constexpr std::uint32_t kBuffersMax = 1 << 14;
    int register_buffers(std::uint32_t count);
    int register_buffer(std::uint32_t slot, std::byte* address, std::size_t size);

   private:
    int register_with(unsigned opcode, void* argument, unsigned count);
    void map(const io_uring_params& params);
    bool can_read();
    void release();

    int fd_ = -1;
    std::uint32_t tail_ = 0;  // of the submissions; the kernel sees it when they are handed over

    void* rings_ = nullptr;
    std::size_t rings_bytes_ = 0;
    io_uring_sqe* sqes_ = nullptr;
    std::size_t sqes_bytes_ = 0;

    // Shared with the kernel, within rings_.
    std::atomic<std::uint32_t>* sq_head_ = nullptr;
    std::atomic<std::uint32_t>* sq_tail_ = nullptr;
    std::uint32_t sq_mask_ = 0;
    std::uint32_t* sq_array_ = nullptr;
    std::atomic<std::uint32_t>* cq_head_ = nullptr;
    std::atomic<std::uint32_t>* cq_tail_ = nullptr;
    std::uint32_t cq_mask_ = 0;
    const io_uring_cqe* cqes_ = nullptr;
};

// 0 if this kernel gives us a ring that reads files, else why not.
int io_uring_errno();

}  // namespace stoker
