#include "reader.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "chunk.hpp"
#include "thread.hpp"

namespace stoker {

namespace {

// Beside the milliseconds that a chunk takes to read; consumers of a window tell nobody when they release.
constexpr std::chrono::milliseconds kWindowPoll{1};

std::unique_ptr<Engine> make_engine(std::string_view name, Source source, Pool& pool, std::uint32_t depth) {
    if (name == "io_uring") return make_uring_engine(std::move(source), pool, depth);
    if (name == "threads") return make_threads_engine(std::move(source), pool, depth);
    throw std::invalid_argument("engine is neither io_uring nor threads");
}

}  // namespace

Reader::Reader(std::shared_ptr<Pool> pool, std::string engine, std::uint32_t depth, std::uint32_t block_bytes)
    : pool_(std::move(pool)), engine_name_(std::move(engine)), block_bytes_(block_bytes) {
    if (depth == 0 || depth > kDepthMax) throw std::invalid_argument("depth is not within 1 to 256");
    if (block_bytes == 0 || block_bytes > kChunkBytes || block_bytes % kAlignBytes != 0) {
        throw std::invalid_argument("block_bytes is no multiple of 4096 up to a chunk");
    }
    engine_ = make_engine(engine_name_, [this] { return take(); }, *pool_, depth);
}

Reader::~Reader() { close(); }

std::shared_ptr<Job> Reader::start(LoadSpec spec) {
    check_table(spec);
    std::vector<std::unique_ptr<File>> files;
    for (FileSpec& file : spec.files) {
        files.push_back(std::make_unique<File>(std::move(file.path), file.size_bytes, file.mtime_ns));
    }
    auto board = Board::create(std::move(spec.table), spec.window);
    const auto job = std::make_shared<Job>(std::move(files), std::move(spec.extents), std::move(board), block_bytes_,
                                           spec.hold, spec.recover);

    const std::lock_guard guard(mutex_);
    if (closed_) throw std::logic_error("the reader is closed");
    std::erase_if(loads_, [](const std::weak_ptr<Job>& load) {
        const auto live = load.lock();
        return live == nullptr || live->ended();
    });
    if (loads_.size() >= kLoadsMax) throw std::invalid_argument("too many loads at once");
    engine_->start();
    if (spec.window > 0 && !watcher_.joinable()) watcher_ = start_thread("stoker-window", [this] { watch_windows(); });
    loads_.push_back(job);
    const auto behind = std::find_if(queue_.begin(), queue_.end(),
                                     [&](const Queued& queued) { return queued.priority < spec.priority; });
    queue_.insert(behind, {job, spec.priority});
    engine_->wake();
    return job;
}

void Reader::check_table(const LoadSpec& spec) const {
    // Of a window only the first round has to differ: Board checks that the rest repeats it.
    const std::size_t distinct = spec.window > 0 ? spec.window : spec.table.size();
    std::vector<bool> seen(pool_->chunks());
    for (std::size_t position = 0; position < spec.table.size(); ++position) {
        const std::uint32_t chunk = spec.table[position];
        if (chunk >= seen.size()) throw std::invalid_argument("a chunk that the pool does not have");
        if (position < distinct && seen[chunk]) throw std::invalid_argument("a chunk for two positions");
        seen[chunk] = true;
    }
}

std::optional<Read> Reader::take() {
    const std::lock_guard guard(mutex_);
    drop_spent();
    for (const Queued& queued : queue_) {
        if (const auto piece = queued.job->take()) return Read(queued.job, *piece);
    }
    if (!queue_.empty() && !held_back_) {
        held_back_ = true;
        changed_.notify_all();
    }
    return std::nullopt;
}

void Reader::drop_spent() {
    std::erase_if(queue_, [](const Queued& queued) { return queued.job->spent(); });
}

void Reader::watch_windows() {
    std::unique_lock lock(mutex_);
    while (!closed_) {
        if (!held_back_) {
            changed_.wait(lock, [this] { return closed_ || held_back_; });
            continue;
        }
        changed_.wait_for(lock, kWindowPoll, [this] { return closed_; });
        drop_spent();
        const bool due =
            std::any_of(queue_.begin(), queue_.end(), [](const Queued& queued) { return queued.job->due(); });
        held_back_ = !due && !queue_.empty();
        if (due) engine_->wake();
    }
}

void Reader::close() {
    const std::lock_guard closing(closing_mutex_);
    std::vector<std::shared_ptr<Job>> live;
    {
        const std::lock_guard guard(mutex_);
        closed_ = true;
        changed_.notify_all();
        for (const auto& load : loads_) {
            if (auto job = load.lock()) live.push_back(std::move(job));
        }
        loads_.clear();
        queue_.clear();
    }
    for (const auto& job : live) job->cancel();
    if (watcher_.joinable()) watcher_.join();
    engine_->stop();
}

}  // namespace stoker
