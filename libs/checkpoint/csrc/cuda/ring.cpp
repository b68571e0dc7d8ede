#include "cuda/ring.hpp"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <new>
#include <stdexcept>
#include <utility>

namespace stoker::cuda {
namespace {

constexpr std::uint64_t kMagic = 0x676e69526b6f7453;  // "StokRing"
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kMaxPositions = 1U << 26;
constexpr std::uint32_t kMaxSlots = 1U << 16;  // 1 TiB

constexpr std::size_t kStreams = 3;
constexpr std::size_t kInFlightMax = 6;  // copies: so that every stream has one waiting behind the one that runs
constexpr double kLookAgain_s = 0.05;    // how long a cancelled feeder may go on waiting

using Word = std::atomic<std::uint32_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 4);

}  // namespace

/// The head of the memfd. The slots follow, then the positions.
struct RingBoard::Shared {
    std::uint64_t magic;
    std::uint32_t version;
    std::uint32_t positions;
    std::uint32_t slots;
    Uuid device;
    Word event;  // the futex: another value after every change of either side
    Word filled;
    Word state;
    // Written before `state`.
    Word failure_kind;
    Word failure_file;
    Word failure_errno;
    std::atomic<std::uint64_t> failure_offset;

    Word* taken() { return reinterpret_cast<Word*>(this + 1); }
    Word* slot_of() { return taken() + slots; }
    static std::size_t size(std::size_t positions, std::size_t slots) {
        return sizeof(Shared) + (slots + positions) * sizeof(Word);
    }
};

std::shared_ptr<RingBoard> RingBoard::create(std::uint32_t positions, std::uint32_t slots, const Uuid& device) {
    if (positions == 0 || positions > kMaxPositions || slots == 0 || slots > kMaxSlots) {
        throw std::invalid_argument("a ring of no or too many positions or slots");
    }
    const std::size_t size = Shared::size(positions, slots);
    Fd fd = create_sealed("stoker-ring", size);
    Mapping memory = map_shared(fd.get(), size);
    auto* const shared = new (memory.address()) Shared{};  // a new memfd is zero: so are slots and positions
    shared->version = kVersion;
    shared->positions = positions;
    shared->slots = slots;
    shared->device = device;
    shared->magic = kMagic;
    return std::shared_ptr<RingBoard>(new RingBoard(std::move(fd), std::move(memory)));
}

std::shared_ptr<RingBoard> RingBoard::open(int fd) {
    const std::size_t size = sealed_size(fd);
    if (size < sizeof(Shared)) throw std::invalid_argument("not a ring's board: too small");
    Fd own = duplicate(fd);
    Mapping memory = map_shared(own.get(), size);
    auto* const shared = std::launder(reinterpret_cast<Shared*>(memory.address()));
    if (shared->magic != kMagic) throw std::invalid_argument("not a ring's board");
    if (shared->version != kVersion) throw std::invalid_argument("a ring's board of another version");
    const std::uint32_t positions = shared->positions;
    const std::uint32_t slots = shared->slots;
    if (positions == 0 || positions > kMaxPositions || slots == 0 || slots > kMaxSlots ||
        Shared::size(positions, slots) != size) {
        throw std::invalid_argument("a ring's board whose size and counts disagree");
    }
    return std::shared_ptr<RingBoard>(new RingBoard(std::move(own), std::move(memory)));
}

RingBoard::RingBoard(Fd fd, Mapping memory)
    : fd_(std::move(fd)),
      memory_(std::move(memory)),
      shared_(std::launder(reinterpret_cast<Shared*>(memory_.address()))),
      positions_(shared_->positions),
      slots_(shared_->slots),
      device_(shared_->device),
      taken_(shared_->taken(), slots_),
      slot_of_(shared_->taken() + slots_, positions_) {}

void RingBoard::announce() {
    shared_->event.fetch_add(1, std::memory_order_release);
    ::syscall(SYS_futex, &shared_->event, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

namespace {

/// Until look() has an answer or the time is up; look is called at least once. Its answer converts to bool.
template <typename Look>
auto wait_for(Word& event, double timeout_s, Look look) {
    const auto deadline = deadline_after(timeout_s).time_since_epoch();  // steady_clock is CLOCK_MONOTONIC
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(deadline);
    const timespec until{.tv_sec = seconds.count(), .tv_nsec = std::chrono::nanoseconds(deadline - seconds).count()};
    while (true) {
        // First the event, then what it tells of: a change in between makes the kernel refuse to wait.
        const std::uint32_t seen = event.load(std::memory_order_acquire);
        if (auto answer = look()) return answer;
        const long waited =
            ::syscall(SYS_futex, &event, FUTEX_WAIT_BITSET, seen, &until, nullptr, FUTEX_BITSET_MATCH_ANY);
        if (waited != 0 && errno == ETIMEDOUT) return look();
        if (waited != 0 && errno != EAGAIN && errno != EINTR) throw_errno("futex");
    }
}

}  // namespace

std::optional<std::uint32_t> RingBoard::take(std::uint32_t start, double timeout_s) {
    return wait_for(shared_->event, timeout_s, [&]() -> std::optional<std::uint32_t> {
        for (std::uint32_t step = 0; step < slots_; ++step) {
            const std::uint32_t slot = (start + step) % slots_;
            if (taken_[slot].load(std::memory_order_acquire) != 0) continue;
            taken_[slot].store(1, std::memory_order_relaxed);
            return slot;
        }
        return std::nullopt;
    });
}

void RingBoard::publish(std::uint32_t position, std::uint32_t slot) {
    slot_of_[position].store(slot, std::memory_order_relaxed);
    shared_->filled.store(position + 1, std::memory_order_release);
    announce();
}

void RingBoard::finish(State state, const Failure& failure) {
    if (this->state() != State::loading) return;
    shared_->failure_kind.store(static_cast<std::uint32_t>(failure.kind), std::memory_order_relaxed);
    shared_->failure_file.store(failure.file, std::memory_order_relaxed);
    shared_->failure_errno.store(static_cast<std::uint32_t>(failure.error), std::memory_order_relaxed);
    shared_->failure_offset.store(failure.offset, std::memory_order_relaxed);
    shared_->state.store(static_cast<std::uint32_t>(state), std::memory_order_release);
    announce();
}

std::uint32_t RingBoard::filled() const { return std::min(shared_->filled.load(std::memory_order_acquire), positions_); }

State RingBoard::state() const { return static_cast<State>(shared_->state.load(std::memory_order_acquire)); }

Failure RingBoard::failure() const {
    if (state() != State::failed) return {};
    return {
        .kind = static_cast<FailureKind>(shared_->failure_kind.load(std::memory_order_relaxed)),
        .file = shared_->failure_file.load(std::memory_order_relaxed),
        .offset = shared_->failure_offset.load(std::memory_order_relaxed),
        .error = static_cast<int>(shared_->failure_errno.load(std::memory_order_relaxed)),
    };
}

bool RingBoard::wait(std::uint32_t position, double timeout_s) const {
    if (position >= positions_) throw std::invalid_argument("no such position");
    wait_for(shared_->event, timeout_s, [&] { return state() != State::loading || filled() > position; });
    return filled() > position;
}

std::uint32_t RingBoard::slot_of(std::uint32_t position) const {
    if (position >= filled()) throw std::invalid_argument("not in the ring yet");
    const std::uint32_t slot = slot_of_[position].load(std::memory_order_relaxed);
    if (slot >= slots_) throw std::invalid_argument("the ring's board is corrupt");
    return slot;
}

void RingBoard::free(std::uint32_t slot) {
    if (slot >= slots_) throw std::invalid_argument("no such slot");
    taken_[slot].store(0, std::memory_order_release);
    announce();
}

namespace {

DeviceMapping allocate(int device, std::uint32_t slots, Fd& fd) {
    if (slots < 2 || slots > kMaxSlots) throw std::invalid_argument("a ring has at least 2 slots");
    return DeviceMapping::create(device_of(device), slots * kChunkBytes, fd);
}

}  // namespace

Ring::Ring(int device, std::uint32_t slots) : slots_(slots), memory_(allocate(device, slots, fd_)) {}

RingView::RingView(int ring_fd, int board_fd, int device)
    : board_(RingBoard::open(board_fd)), memory_([&] {
          const Device& own = device_of(device);
          if (own.uuid != board_->device()) throw std::invalid_argument("the ring is on another device");
          return DeviceMapping::attach(own, board_->slots() * kChunkBytes, ring_fd);
      }()) {}

namespace {

struct Stream {
    StreamHandle* handle = nullptr;
    Stream() { check(driver().cuStreamCreate(&handle, kStreamNonBlocking), "cuStreamCreate"); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    /// No copy on it reads host memory any more after this.
    ~Stream() {
        driver().cuStreamSynchronize(handle);
        driver().cuStreamDestroy_v2(handle);
    }
};

struct Event {
    EventHandle* handle = nullptr;
    Event() { check(driver().cuEventCreate(&handle, kEventBlockingSync | kEventDisableTiming), "cuEventCreate"); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { driver().cuEventDestroy_v2(handle); }
};

/// The copies of one feeder that are under way, oldest first.
class Lane {
   public:
    bool empty() const { return landed_ == launched_; }
    bool full() const { return launched_ - landed_ == kInFlightMax; }

    void launch(std::uint32_t slot, Address to, const std::byte* from, std::size_t bytes) {
        StreamHandle* const stream = streams_[launched_ % kStreams].handle;
        if (bytes > 0) check(driver().cuMemcpyHtoDAsync_v2(to, from, bytes, stream), "cuMemcpyHtoDAsync");
        check(driver().cuEventRecord(events_[launched_ % kInFlightMax].handle, stream), "cuEventRecord");
        slots_[launched_ % kInFlightMax] = slot;
        ++launched_;
    }

    /// Waits for the oldest copy; its slot.
    std::uint32_t land() {
        check(driver().cuEventSynchronize(events_[landed_ % kInFlightMax].handle), "cuEventSynchronize");
        return slots_[landed_++ % kInFlightMax];
    }

   private:
    std::array<Event, kInFlightMax> events_;
    std::array<Stream, kStreams> streams_;
    std::array<std::uint32_t, kInFlightMax> slots_{};
    std::size_t launched_ = 0;  // copies
    std::size_t landed_ = 0;
};

}  // namespace

Feeder::Feeder(std::shared_ptr<const Ring> ring, std::shared_ptr<Board> board, std::shared_ptr<const Pool> pool,
               std::vector<Span> spans)
    : ring_(std::move(ring)),
      board_(std::move(board)),
      pool_(std::move(pool)),
      spans_(std::move(spans)),
      ring_board_(RingBoard::create(board_->positions(), ring_->slots(), ring_->device().uuid)),
      ended_(create_event()) {
    if (spans_.size() != board_->positions()) throw std::invalid_argument("not one span per position");
    for (const Span& span : spans_) {
        if (span.offset > kChunkBytes || span.size > kChunkBytes - span.offset) {
            throw std::invalid_argument("a span outside of its chunk");
        }
    }
    for (const std::uint32_t chunk : board_->table()) {
        if (chunk >= pool_->chunks()) throw std::invalid_argument("a chunk outside of the pool");
    }
    thread_ = std::thread([this] { run(); });
}

Feeder::~Feeder() {
    cancel();
    thread_.join();
}

bool Feeder::join(double timeout_s) const {
    const auto deadline = deadline_after(timeout_s);
    while (true) {
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
        pollfd ended{.fd = ended_.get(), .events = POLLIN, .revents = 0};
        const int count = ::poll(&ended, 1, static_cast<int>(std::clamp<long>(left.count(), 0, INT_MAX)));
        if (count > 0) return true;
        if (count < 0 && errno != EINTR) throw_errno("poll");
        if (left.count() <= 0) return false;
    }
}

void Feeder::run() noexcept {
    try {
        const Current current(ring_->device());
        feed();
    } catch (const Error& error) {
        ring_board_->finish(State::failed, {.kind = kDeviceError, .error = error.code});
    }
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(ended_.get(), &one, sizeof one);
}

void Feeder::feed() {
    const std::uint32_t positions = board_->positions();
    Lane lane;
    std::uint32_t next = 0;    // to launch
    std::uint32_t landed = 0;  // positions published
    while (landed < positions) {
        if (cancelled_) return ring_board_->finish(State::cancelled);
        // With copies under way nothing else is waited for: they land soon, and then there is more to see.
        const double patience_s = lane.empty() ? kLookAgain_s : 0;
        if (next < positions && !lane.full()) {
            const bool ended = board_->state() != State::loading;  // before the look that it explains
            if (board_->wait(next, patience_s)) {
                if (const auto slot = ring_board_->take(next, patience_s)) {
                    const auto [offset, size] = spans_[next];
                    lane.launch(*slot, ring_->address(*slot) + offset,
                                pool_->chunk_address(board_->table()[next]) + offset, size);
                    ++next;
                    continue;
                }
            } else if (ended && lane.empty()) {
                return ring_board_->finish(board_->state(), board_->failure());
            }
        }
        if (lane.empty()) continue;
        const std::uint32_t slot = lane.land();
        ring_board_->publish(landed++, slot);
        if (board_->window() > 0) board_->release(landed);
    }
    ring_board_->finish(State::done);
}

}  // namespace stoker::cuda
