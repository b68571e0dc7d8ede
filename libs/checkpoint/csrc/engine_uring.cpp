#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>
#include <utility>
#include <vector>

#include "chunk.hpp"
#include "engine.hpp"
#include "memory.hpp"
#include "thread.hpp"
#include "uring.hpp"

namespace stoker {

namespace {

Fd create_event() {
    Fd fd(::eventfd(0, EFD_CLOEXEC));  // not O_NONBLOCK: the ring would answer EAGAIN instead of waiting
    if (fd.get() < 0) throw_errno("eventfd");
    return fd;
}

/// One thread, which alone touches the ring and the slots.
class UringEngine final : public Engine {
   public:
    UringEngine(Source source, Pool& pool, std::uint32_t depth)
        : source_(std::move(source)), pool_(pool), event_(create_event()), ring_(depth + 1), slots_(depth) {
        for (std::uint32_t slot = 0; slot < depth; ++slot) free_.push_back(slot);
        registered_.resize(std::min(pool.chunks(), Ring::kBuffersMax));
        registering_ = ring_.register_buffers(static_cast<std::uint32_t>(registered_.size())) == 0;
    }
    ~UringEngine() override { stop(); }

    void start() override {
        if (!thread_.joinable()) thread_ = start_thread("stoker-uring", [this] { run(); });
    }

    void wake() override {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto written = ::write(event_.get(), &one, sizeof one);
    }

    void stop() override {
        if (!thread_.joinable()) return;
        stopping_ = true;
        wake();
        thread_.join();
    }

    bool registered_buffers() const override { return registering_; }

   private:
    /// Beside the slots: the read of the eventfd.
    std::uint64_t wake_tag() const { return slots_.size(); }

    /// A ring that cannot be entered is a bug, and reads would be left in flight: it ends the process.
    void run() noexcept {
        ring_.enable();
        await_wake();
        while (!stopping_ || awaiting_ || free_.size() < slots_.size()) {
            if (!stopping_) fill();
            ring_.submit_and_wait();
            io_uring_cqe completion;
            while (ring_.pop(completion)) {
                if (completion.user_data != wake_tag()) {
                    finish(static_cast<std::uint32_t>(completion.user_data), completion.res);
                } else {
                    awaiting_ = false;
                    if (!stopping_) await_wake();
                }
            }
        }
    }

    void await_wake() {
        awaiting_ = true;
        prepare(event_.get(), &wakes_, sizeof wakes_, 0, wake_tag());
    }

    void fill() {
        while (!free_.empty()) {
            std::optional<Read> read = source_();
            if (!read) return;
            if (!read->begin()) continue;
            const std::uint32_t slot = free_.back();
            free_.pop_back();
            slots_[slot] = std::move(read);
            submit(slot);
        }
    }

    void finish(std::uint32_t slot, std::int32_t result) {
        if (slots_[slot]->on_result(result)) {
            submit(slot);
        } else {
            slots_[slot].reset();
            free_.push_back(slot);
        }
    }

    void submit(std::uint32_t slot) {
        const Read& read = *slots_[slot];
        std::byte* const target = pool_.chunk_address(read.chunk()) + read.offset() % kChunkBytes;
        io_uring_sqe& entry = prepare(read.fd(), target, read.size(), read.offset(), slot);
        if (is_registered(read.chunk())) {
            entry.opcode = IORING_OP_READ_FIXED;
            entry.buf_index = static_cast<std::uint16_t>(read.chunk());
        }
    }

    /// Chunks are registered when they are first read into, once the pool is through with them: pinned pages cannot
    /// become huge. It costs what one read's pinning does, and every later read of the chunk saves that.
    bool is_registered(std::uint32_t chunk) {
        if (chunk >= registered_.size()) return false;
        if (!registered_[chunk] && registering_ && pool_.is_warm(chunk)) {
            registered_[chunk] = ring_.register_buffer(chunk, pool_.chunk_address(chunk), kChunkBytes) == 0;
            registering_ = registered_[chunk];  // one refusal is enough: reads do without
        }
        return registered_[chunk];
    }

    io_uring_sqe& prepare(int fd, void* target, std::uint32_t size, std::uint64_t offset, std::uint64_t tag) {
        io_uring_sqe& entry = ring_.next();
        entry.opcode = IORING_OP_READ;
        entry.fd = fd;
        entry.addr = reinterpret_cast<std::uint64_t>(target);
        entry.len = size;
        entry.off = offset;
        entry.user_data = tag;
        return entry;
    }

    const Source source_;
    Pool& pool_;
    const Fd event_;
    std::uint64_t wakes_ = 0;  // written by the kernel,
    bool awaiting_ = false;    // while this is set
    Ring ring_;
    std::vector<std::optional<Read>> slots_;
    std::vector<std::uint32_t> free_;
    std::vector<bool> registered_;           // chunks
    std::atomic<bool> registering_ = false;  // written by the thread, once it runs
    std::atomic<bool> stopping_ = false;
    std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> make_uring_engine(Source source, Pool& pool, std::uint32_t depth) {
    return std::make_unique<UringEngine>(std::move(source), pool, depth);
}

}  // namespace stoker
