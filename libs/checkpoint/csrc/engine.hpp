// What makes the system calls. An engine asks its source for reads, and gives each the kernel's answers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "pool.hpp"
#include "read.hpp"

namespace stoker {

/// The next read to make, or none at the moment. Thread safe; does not wait.
using Source = std::function<std::optional<Read>()>;

class Engine {
   public:
    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    virtual ~Engine() = default;

    /// Starts its threads; again: nothing. Throws std::system_error if there can be none.
    virtual void start() = 0;

    /// The source may have something new. It is asked after every read that ends, too.
    virtual void wake() = 0;

    /// Ends its threads once the reads in flight have ended. Idempotent; the destructor does the same.
    virtual void stop() = 0;

    /// Whether the kernel holds on to the chunks it reads into, instead of pinning their pages for every read.
    virtual bool registered_buffers() const { return false; }
};

/// depth: threads, each with one pread.
std::unique_ptr<Engine> make_threads_engine(Source source, Pool& pool, std::uint32_t depth);

/// depth: reads in flight in one ring. Throws std::system_error if the kernel refuses (ENOSYS, EPERM, ENOMEM).
std::unique_ptr<Engine> make_uring_engine(Source source, Pool& pool, std::uint32_t depth);

}  // namespace stoker
