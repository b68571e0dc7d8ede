#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "chunk.hpp"
#include "engine.hpp"
#include "thread.hpp"

namespace stoker {

namespace {

class ThreadsEngine final : public Engine {
   public:
    ThreadsEngine(Source source, Pool& pool, std::uint32_t depth)
        : source_(std::move(source)), pool_(pool), depth_(depth) {}
    ~ThreadsEngine() override { stop(); }

    void start() override {
        while (threads_.size() < depth_) threads_.push_back(start_thread("stoker-read", [this] { run(); }));
    }

    void wake() override {
        const std::lock_guard guard(mutex_);
        ++wakes_;
        changed_.notify_all();
    }

    void stop() override {
        {
            const std::lock_guard guard(mutex_);
            stopping_ = true;
            changed_.notify_all();
        }
        for (std::thread& thread : threads_) {
            if (thread.joinable()) thread.join();
        }
    }

   private:
    void run() {
        std::unique_lock lock(mutex_);
        while (!stopping_) {
            const std::uint64_t seen = wakes_;
            lock.unlock();
            const bool worked = read_next();
            lock.lock();
            if (!worked) changed_.wait(lock, [&] { return stopping_ || wakes_ != seen; });
        }
    }

    bool read_next() {
        std::optional<Read> read = source_();
        if (!read) return false;
        bool more = read->begin();
        while (more) {
            std::byte* const target = pool_.chunk_address(read->chunk()) + read->offset() % kChunkBytes;
            const ssize_t count = ::pread(read->fd(), target, read->size(), static_cast<off_t>(read->offset()));
            more = read->on_result(count >= 0 ? count : -errno);
        }
        return true;
    }

    const Source source_;
    Pool& pool_;
    const std::uint32_t depth_;
    std::vector<std::thread> threads_;  // of start() and stop() alone

    std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    std::uint64_t wakes_ = 0;
    bool stopping_ = false;
};

}  // namespace

std::unique_ptr<Engine> make_threads_engine(Source source, Pool& pool, std::uint32_t depth) {
    return std::make_unique<ThreadsEngine>(std::move(source), pool, depth);
}

}  // namespace stoker
