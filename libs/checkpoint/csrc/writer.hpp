// Calls of the kernel that may wait for a disk, in threads of its own: between two of them nobody waits for an interpreter.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory.hpp"

namespace stoker {

/// Thread safe.
class Writer {
   public:
    static constexpr std::uint32_t kThreadsMax = 64;
    static constexpr std::size_t kQueuedMax = 1024;

    struct Done {
        std::uint64_t ticket;
        std::int64_t result;  // what the call returned, or -errno
    };

    /// Throws std::invalid_argument for a number of threads that is not within 1 to kThreadsMax.
    explicit Writer(std::uint32_t threads);
    ~Writer();

    /// One pwrite: it may write less. Descriptor and bytes must stay as they are until it is done. Returns its ticket.
    ///
    /// Throws std::invalid_argument beyond kQueuedMax, std::logic_error once closed.
    std::uint64_t write(int fd, const std::byte* data, std::size_t size, std::uint64_t offset);

    /// One fdatasync, open or rename. As `write`.
    std::uint64_t sync(int fd);
    std::uint64_t open(std::string path, int flags, unsigned mode);
    std::uint64_t rename(std::string from, std::string to);

    /// Readable while there is something to take.
    int event_fd() const { return event_.get(); }
    std::vector<Done> take_done();

    /// Does what is queued, then ends the threads. Idempotent.
    void close();

   private:
    using Call = std::function<std::int64_t()>;  // as the kernel has it: -1 and errno for a failure

    struct Work {
        std::uint64_t ticket;
        Call call;
    };

    std::uint64_t add(Call call);
    void run();

    const Fd event_;
    std::vector<std::thread> threads_;

    std::mutex closing_mutex_;  // held while closing, so that every close() returns when all is over
    std::mutex mutex_;          // guards what follows
    std::condition_variable changed_;
    std::deque<Work> queue_;
    std::vector<Done> done_;
    std::uint64_t tickets_ = 0;
    bool closed_ = false;
};

}  // namespace stoker
