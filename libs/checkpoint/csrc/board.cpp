#include "board.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <new>
#include <stdexcept>
#include <utility>

namespace stoker {

namespace {

constexpr std::uint64_t kMagic = 0x64726f61426b7453;  // "StkBoard"
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kMaxPositions = 1U << 26;  // 1 PiB of chunks: a bound for the arithmetic on what others wrote

static_assert(std::atomic<std::uint32_t>::is_always_lock_free && sizeof(std::atomic<std::uint32_t>) == 4);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);

std::size_t ready_words(std::size_t positions) { return (positions + 63) / 64; }

}  // namespace

/// The head of the memfd. The bitmap follows, then the table.
struct Board::Shared {
    std::uint64_t magic;
    std::uint32_t version;
    std::uint32_t positions;
    std::uint32_t window;
    std::atomic<std::uint32_t> event;  // the futex: another value after every change
    std::atomic<std::uint32_t> state;
    std::atomic<std::uint32_t> ready_count;
    std::atomic<std::uint32_t> released;
    // Written before `state`.
    std::atomic<std::uint32_t> failure_kind;
    std::atomic<std::uint32_t> failure_file;
    std::atomic<std::uint32_t> failure_errno;
    std::atomic<std::uint64_t> failure_offset;

    std::atomic<std::uint64_t>* ready() { return reinterpret_cast<std::atomic<std::uint64_t>*>(this + 1); }
    std::uint32_t* table() { return reinterpret_cast<std::uint32_t*>(ready() + ready_words(positions)); }
    static std::size_t size(std::size_t positions) {
        return sizeof(Shared) + ready_words(positions) * sizeof(std::uint64_t) + positions * sizeof(std::uint32_t);
    }
};

std::shared_ptr<Board> Board::create(std::vector<std::uint32_t> table, std::uint32_t window) {
    if (table.empty() || table.size() > kMaxPositions) {
        throw std::invalid_argument("a board of no or too many positions");
    }
    if (window > table.size()) throw std::invalid_argument("the window is larger than the table");
    for (std::size_t position = window; window > 0 && position < table.size(); ++position) {
        if (table[position] != table[position - window]) {
            throw std::invalid_argument("the table does not repeat its window");
        }
    }
    const std::size_t size = Shared::size(table.size());
    Fd fd = create_sealed("stoker-board", size);
    Mapping memory = map_shared(fd.get(), size);
    auto* const shared = new (memory.address()) Shared{};  // a new memfd is zero: so are bitmap and table
    shared->version = kVersion;
    shared->positions = static_cast<std::uint32_t>(table.size());
    shared->window = window;
    std::copy(table.begin(), table.end(), shared->table());
    shared->magic = kMagic;
    return std::shared_ptr<Board>(new Board(std::move(fd), std::move(memory), std::move(table), window));
}

std::shared_ptr<Board> Board::open(int fd) {
    const std::size_t size = sealed_size(fd);
    if (size < sizeof(Shared)) throw std::invalid_argument("not a board: too small");
    Fd own = duplicate(fd);
    Mapping memory = map_shared(own.get(), size);
    auto* const shared = std::launder(reinterpret_cast<Shared*>(memory.address()));
    if (shared->magic != kMagic) throw std::invalid_argument("not a board");
    if (shared->version != kVersion) throw std::invalid_argument("a board of another version");
    const std::uint32_t positions = shared->positions;
    const std::uint32_t window = shared->window;
    if (positions == 0 || positions > kMaxPositions || window > positions || Shared::size(positions) != size) {
        throw std::invalid_argument("a board whose size and counts disagree");
    }
    std::vector<std::uint32_t> table(shared->table(), shared->table() + positions);
    return std::shared_ptr<Board>(new Board(std::move(own), std::move(memory), std::move(table), window));
}

Board::Board(Fd fd, Mapping memory, std::vector<std::uint32_t> table, std::uint32_t window)
    : fd_(std::move(fd)),
      memory_(std::move(memory)),
      table_(std::move(table)),
      window_(window),
      shared_(std::launder(reinterpret_cast<Shared*>(memory_.address()))),
      ready_(shared_->ready(), ready_words(table_.size())) {}

void Board::check(std::uint32_t position) const {
    if (position >= positions()) throw std::invalid_argument("no such position");
}

void Board::announce() {
    shared_->event.fetch_add(1, std::memory_order_release);
    ::syscall(SYS_futex, &shared_->event, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Board::mark_ready(std::uint32_t position) {
    check(position);
    const std::uint64_t bit = std::uint64_t{1} << (position % 64);
    if (ready_[position / 64].fetch_or(bit, std::memory_order_acq_rel) & bit) return;
    shared_->ready_count.fetch_add(1, std::memory_order_acq_rel);
    announce();
}

bool Board::finish(State state, const Failure& failure) {
    const std::lock_guard guard(finish_mutex_);
    if (this->state() != State::loading) return false;
    shared_->failure_kind.store(static_cast<std::uint32_t>(failure.kind), std::memory_order_relaxed);
    shared_->failure_file.store(failure.file, std::memory_order_relaxed);
    shared_->failure_errno.store(static_cast<std::uint32_t>(failure.error), std::memory_order_relaxed);
    shared_->failure_offset.store(failure.offset, std::memory_order_relaxed);
    shared_->state.store(static_cast<std::uint32_t>(state), std::memory_order_release);
    announce();
    return true;
}

std::uint32_t Board::released() const {
    return std::min(shared_->released.load(std::memory_order_acquire), positions());
}

std::uint32_t Board::ready_count() const { return shared_->ready_count.load(std::memory_order_acquire); }

State Board::state() const { return static_cast<State>(shared_->state.load(std::memory_order_acquire)); }

Failure Board::failure() const {
    if (state() != State::failed) return {};
    return {
        .kind = static_cast<FailureKind>(shared_->failure_kind.load(std::memory_order_relaxed)),
        .file = shared_->failure_file.load(std::memory_order_relaxed),
        .offset = shared_->failure_offset.load(std::memory_order_relaxed),
        .error = static_cast<int>(shared_->failure_errno.load(std::memory_order_relaxed)),
    };
}

bool Board::is_ready(std::uint32_t position) const {
    check(position);
    return (ready_[position / 64].load(std::memory_order_acquire) >> (position % 64) & 1) != 0;
}

bool Board::wait(std::uint32_t position, double timeout_s) const {
    const auto deadline = deadline_after(timeout_s).time_since_epoch();  // steady_clock is CLOCK_MONOTONIC
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(deadline);
    const timespec until{.tv_sec = seconds.count(), .tv_nsec = std::chrono::nanoseconds(deadline - seconds).count()};
    while (true) {
        // First the event, then what it tells of: a change in between makes the kernel refuse to wait.
        const std::uint32_t seen = shared_->event.load(std::memory_order_acquire);
        const bool ended = state() != State::loading;
        if (is_ready(position)) return true;
        if (ended) return false;
        const long waited = ::syscall(SYS_futex, &shared_->event, FUTEX_WAIT_BITSET, seen, &until, nullptr,
                                      FUTEX_BITSET_MATCH_ANY);  // an absolute time, and not FUTEX_PRIVATE
        if (waited != 0 && errno == ETIMEDOUT) return is_ready(position);
        if (waited != 0 && errno != EAGAIN && errno != EINTR) throw_errno("futex");
    }
}

void Board::release(std::uint32_t position) {
    if (position > positions()) throw std::invalid_argument("no such position");
    std::uint32_t current = shared_->released.load(std::memory_order_relaxed);
    while (current < position &&
           !shared_->released.compare_exchange_weak(current, position, std::memory_order_release)) {
    }
}

}  // namespace stoker
