// Reads files into a pool: one engine, and one queue for all loads.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "engine.hpp"
#include "job.hpp"
#include "pool.hpp"

namespace stoker {

struct FileSpec {
    std::string path;
    std::uint64_t size_bytes;
    std::int64_t mtime_ns;  // -1: not checked
};

struct LoadSpec {
    std::vector<FileSpec> files;
    std::vector<Extent> extents;
    std::vector<std::uint32_t> table;  // position -> chunk
    std::uint32_t window = 0;
    bool hold = false;
    bool recover = false;
    int priority = 0;  // higher first, else by arrival
};

/// Thread safe.
class Reader {
   public:
    static constexpr std::uint32_t kDepthMax = 256;
    static constexpr std::size_t kLoadsMax = 256;  // at once

    /// engine: io_uring | threads.  depth: reads in flight, each of at most block_bytes.
    ///
    /// Throws std::invalid_argument for what is out of range, std::system_error if the kernel refuses the engine.
    Reader(std::shared_ptr<Pool> pool, std::string engine, std::uint32_t depth, std::uint32_t block_bytes);
    ~Reader();

    /// Throws std::invalid_argument for what breaks the rules of Job and Board, for chunks that the pool does not have
    /// or that two positions share, and for more than kLoadsMax loads; std::logic_error once closed.
    std::shared_ptr<Job> start(LoadSpec spec);

    /// Cancels its loads, waits for reads in flight, ends its threads. Idempotent.
    void close();

    const std::string& engine() const { return engine_name_; }
    bool registered_buffers() const { return engine_->registered_buffers(); }

   private:
    struct Queued {
        std::shared_ptr<Job> job;
        int priority;
    };

    void check_table(const LoadSpec& spec) const;
    std::optional<Read> take();
    void drop_spent();
    void watch_windows();

    const std::shared_ptr<Pool> pool_;
    const std::string engine_name_;
    const std::uint32_t block_bytes_;

    std::mutex closing_mutex_;  // held while closing, so that every close() returns when all is over
    std::mutex mutex_;          // guards what follows
    std::condition_variable changed_;
    std::vector<Queued> queue_;  // those with something left to read, in order
    std::vector<std::weak_ptr<Job>> loads_;
    bool held_back_ = false;  // the engine found nothing but full windows
    bool closed_ = false;

    std::thread watcher_;
    std::unique_ptr<Engine> engine_;
};

}  // namespace stoker
