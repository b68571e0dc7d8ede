// The device ring against a stand-in for libcuda (fake_cuda.cpp): no GPU is needed, and none was used.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "board.hpp"
#include "check.hpp"
#include "cuda/driver.hpp"
#include "cuda/ring.hpp"
#include "pool.hpp"

namespace {

using namespace stoker;
using cuda::Feeder;
using cuda::Ring;
using cuda::RingView;

constexpr double kBound_s = 20;
constexpr std::uint32_t kSlots = 3;
constexpr std::uint32_t kBytes = 64 << 10;  // of each chunk: the rest of it is never touched
constexpr std::uint32_t kOffset = 4096;

/// The driver is libfake_cuda from here on.
struct Fake {
    Fake() { cuda::use_library(FAKE_CUDA); }
    void* const library = dlopen(FAKE_CUDA, RTLD_NOW);
    int (*const live)() = reinterpret_cast<int (*)()>(dlsym(library, "fake_cuda_live"));
    int (*const registered)() = reinterpret_cast<int (*)()>(dlsym(library, "fake_cuda_registered"));
    void (*const fail)(const char*, int, int) =
        reinterpret_cast<void (*)(const char*, int, int)>(dlsym(library, "fake_cuda_fail"));
};
const Fake fake;

std::byte expected(std::uint32_t position, std::uint32_t at) { return std::byte((position * 31 + at * 7 + 1) & 0xff); }

/// A load of `positions` chunks and the ring it is fed into. Chunks repeat after `window`.
struct Rig {
    explicit Rig(std::uint32_t positions, std::uint32_t window = 0)
        : pool(Pool::create(window > 0 ? window : positions, {.huge = Huge::none, .lock = false, .fault_threads = 0})) {
        std::vector<std::uint32_t> table(positions);
        for (std::uint32_t position = 0; position < positions; ++position) table[position] = position % pool->chunks();
        board = Board::create(std::move(table), window);
    }

    void fill(std::uint32_t position) {
        std::byte* const bytes = pool->chunk_address(board->table()[position]) + kOffset;
        for (std::uint32_t at = 0; at < kBytes; ++at) bytes[at] = expected(position, at);
        board->mark_ready(position);
    }

    Feeder& feed() {
        feeder.emplace(ring, board, pool, std::vector<cuda::Span>(board->positions(), {kOffset, kBytes}));
        view.emplace(ring->fd(), feeder->ring_board().fd(), 0);
        return *feeder;
    }

    bool holds(std::uint32_t position) const {
        const auto* const bytes = reinterpret_cast<const std::byte*>(
            static_cast<std::uintptr_t>(view->address(view->board().slot_of(position)) + kOffset));
        for (std::uint32_t at = 0; at < kBytes; ++at) {
            if (bytes[at] != expected(position, at)) return false;
        }
        return true;
    }

    std::shared_ptr<Pool> pool;
    std::shared_ptr<Board> board;
    std::shared_ptr<Ring> ring = std::make_shared<Ring>(0, kSlots);
    std::optional<Feeder> feeder;
    std::optional<RingView> view;
};

TEST(without_a_driver_it_says_why) {
    cuda::use_library("libcuda-that-does-not-exist.so.1");
    const cuda::Availability found = cuda::availability();
    CHECK(!found.usable && found.reason.find("libcuda-that-does-not-exist") != std::string::npos);
    CHECK_THROWS(cuda::Error, Ring(0, kSlots));
    cuda::pinner()(nullptr, kChunkBytes);  // no error, but told
    CHECK(cuda::pinned().bytes == 0 && !cuda::pinned().reason.empty());
    cuda::use_library(FAKE_CUDA);
}

TEST(with_a_driver_it_is_available) {
    CHECK(cuda::availability().usable);
    fake.fail("cuDevicePrimaryCtxRetain", 0, 2);
    CHECK_THROWS(cuda::Error, cuda::device_of(1));
    fake.fail(nullptr, 0, 0);
    CHECK(cuda::device_of(1).ordinal == 1);
    CHECK_THROWS(cuda::Error, Ring(7, kSlots));
    CHECK_THROWS(std::invalid_argument, Ring(0, 1));
}

void feed_and_free_out_of_order() {
    Rig rig(11);
    rig.feed();
    std::thread reading([&] {
        std::vector<std::uint32_t> order(11);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), std::mt19937(7));
        for (const std::uint32_t position : order) rig.fill(position);
        rig.board->finish(State::done);
    });
    auto& board = rig.view->board();
    std::optional<std::uint32_t> kept;  // a slot that is freed after the next one
    for (std::uint32_t position = 0; position < 11; ++position) {
        CHECK(board.wait(position, kBound_s));
        CHECK(rig.holds(position));
        if (kept) {
            board.free(board.slot_of(position));
            board.free(*std::exchange(kept, std::nullopt));
        } else {
            kept = board.slot_of(position);
        }
    }
    reading.join();
    CHECK(rig.feeder->join(kBound_s));
    CHECK(board.state() == State::done && board.filled() == 11);
}

TEST(every_position_arrives_whatever_the_order_of_freeing) { feed_and_free_out_of_order(); }

TEST(a_full_ring_waits_for_the_consumer) {
    Rig rig(5);
    rig.feed();
    for (std::uint32_t position = 0; position < 5; ++position) rig.fill(position);
    auto& board = rig.view->board();
    CHECK(board.wait(kSlots - 1, kBound_s));
    CHECK(!board.wait(kSlots, 0.1) && board.filled() == kSlots);
    board.free(board.slot_of(1));
    CHECK(board.wait(kSlots, kBound_s) && board.slot_of(kSlots) == board.slot_of(1));
    CHECK(rig.holds(0) && rig.holds(2) && rig.holds(kSlots));
}

TEST(a_consumer_that_is_gone_holds_nobody_up) {
    Rig rig(5);
    Feeder& feeder = rig.feed();
    for (std::uint32_t position = 0; position < 5; ++position) rig.fill(position);
    CHECK(rig.view->board().wait(kSlots - 1, kBound_s));
    CHECK(!feeder.join(0));
    feeder.cancel();
    CHECK(feeder.join(kBound_s));
    CHECK(rig.view->board().state() == State::cancelled);
}

TEST(copies_in_flight_end_before_a_cancelled_feeder_does) {
    for (int round = 0; round < 40; ++round) {
        Rig rig(kSlots);
        for (std::uint32_t position = 0; position < kSlots; ++position) rig.fill(position);
        Feeder& feeder = rig.feed();
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(10 * round);
        while (std::chrono::steady_clock::now() < until) {
        }
        feeder.cancel();
        CHECK(feeder.join(kBound_s));  // else the stand-in aborts
    }
}

TEST(a_load_that_fails_hands_on_what_was_ready_and_why) {
    Rig rig(5);
    rig.feed();
    rig.fill(0);
    rig.fill(1);
    rig.board->finish(State::failed, {.kind = FailureKind::read_error, .file = 3, .offset = 12345, .error = EIO});
    auto& board = rig.view->board();
    CHECK(rig.feeder->join(kBound_s));
    CHECK(board.wait(1, 0) && rig.holds(0) && rig.holds(1));
    CHECK(!board.wait(2, kBound_s));
    CHECK(board.state() == State::failed);
    const Failure failure = board.failure();
    CHECK(failure.kind == FailureKind::read_error && failure.file == 3 && failure.offset == 12345 && failure.error == EIO);
    CHECK_THROWS(std::invalid_argument, board.slot_of(2));
}

TEST(a_cancelled_load_cancels_the_ring) {
    Rig rig(5);
    rig.feed();
    rig.board->finish(State::cancelled);
    CHECK(!rig.view->board().wait(0, kBound_s));
    CHECK(rig.view->board().state() == State::cancelled);
}

TEST(a_device_that_fails_ends_this_ring_alone) {
    for (const char* call : {"cuMemcpyHtoDAsync", "cuEventSynchronize", "cuStreamCreate", "cuEventCreate"}) {
        Rig rig(5);
        for (std::uint32_t position = 0; position < 5; ++position) rig.fill(position);
        fake.fail(call, 1, 700);
        rig.feed();
        CHECK(!rig.view->board().wait(4, kBound_s));
        CHECK(rig.feeder->join(kBound_s));
        fake.fail(nullptr, 0, 0);
        CHECK(rig.view->board().failure().kind == cuda::kDeviceError);
        CHECK(rig.view->board().failure().error == 700);
    }
    feed_and_free_out_of_order();  // the next one works
}

TEST(memory_that_is_refused_is_an_error_and_leaks_nothing) {
    const int live = fake.live();
    for (const char* call : {"cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess",
                             "cuMemExportToShareableHandle"}) {
        fake.fail(call, 0, 2);
        CHECK_THROWS(cuda::Error, Ring(0, kSlots));
        fake.fail(nullptr, 0, 0);
        CHECK(fake.live() == live);
    }
}

TEST(a_window_is_released_as_its_positions_reach_the_device) {
    Rig rig(9, 2);
    rig.feed();
    std::thread reading([&] {
        for (std::uint32_t position = 0; position < 9; ++position) {
            while (position >= 2 && rig.board->released() < position - 1) std::this_thread::yield();
            rig.fill(position);
        }
    });
    auto& board = rig.view->board();
    for (std::uint32_t position = 0; position < 9; ++position) {
        CHECK(board.wait(position, kBound_s));
        CHECK(rig.holds(position));
        board.free(board.slot_of(position));
    }
    reading.join();
}

TEST(tensors_outlive_the_producer) {
    Rig rig(2);
    rig.feed();
    rig.fill(0);
    rig.fill(1);
    CHECK(rig.view->board().wait(1, kBound_s));
    rig.feeder.reset();
    rig.ring.reset();
    rig.pool.reset();
    CHECK(rig.holds(0) && rig.holds(1));
}

TEST(a_consumer_that_scribbles_over_the_board_spoils_its_own_load_alone) {
    Rig rig(6);
    rig.feed();
    const std::size_t size = sealed_size(rig.feeder->ring_board().fd());
    const Mapping scribbled = map_shared(rig.feeder->ring_board().fd(), size);
    for (std::uint32_t position = 0; position < 6; ++position) {
        auto* const words = reinterpret_cast<std::atomic<std::uint32_t>*>(scribbled.address());
        for (std::size_t word = 0; word < size / 4; ++word) words[word].store(position % 2 ? ~0U : 0U);
        rig.fill(position);
    }
    rig.feeder->cancel();
    CHECK(rig.feeder->join(kBound_s));
}

TEST(a_warm_pool_is_pinned_until_it_goes) {
    std::shared_ptr<Pool> pool = Pool::create(3, {.huge = Huge::none, .lock = false, .fault_threads = 1});
    pool->set_on_warm(cuda::pinner());
    CHECK(pool->wait_warm(kBound_s));
    pool->close();
    CHECK(fake.registered() == 3 && cuda::pinned().bytes == 3 * kChunkBytes);
    pool.reset();
    CHECK(fake.registered() == 0 && cuda::pinned().bytes == 0);
}

TEST(a_pool_that_cannot_be_pinned_works_and_tells) {
    std::shared_ptr<Pool> pool = Pool::create(3, {.huge = Huge::none, .lock = false, .fault_threads = 1});
    fake.fail("cuMemHostRegister", 1, 2);
    pool->set_on_warm(cuda::pinner());
    CHECK(pool->wait_warm(kBound_s));
    pool->close();
    fake.fail(nullptr, 0, 0);
    CHECK(cuda::pinned().bytes == kChunkBytes);
    CHECK(cuda::pinned().reason == "cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY");
}

TEST(what_is_no_ring_is_refused) {
    Rig rig(3);
    rig.feed();
    const int board_fd = rig.feeder->ring_board().fd();
    CHECK_THROWS(std::invalid_argument, RingView(rig.ring->fd(), board_fd, 1));
    CHECK_THROWS(std::invalid_argument, RingView(rig.ring->fd(), rig.board->fd(), 0));
    CHECK_THROWS(std::invalid_argument, RingView(rig.ring->fd(), rig.ring->fd(), 0));
    CHECK_THROWS(cuda::Error, RingView(-1, board_fd, 0));
    const Fd blank = create_sealed("blank", 4096);
    CHECK_THROWS(std::invalid_argument, RingView(rig.ring->fd(), blank.get(), 0));
    CHECK_THROWS(std::invalid_argument, Feeder(rig.ring, rig.board, rig.pool, {{0, 1}}));
    const std::vector<cuda::Span> outside(3, {kChunkBytes, 1});
    CHECK_THROWS(std::invalid_argument, Feeder(rig.ring, rig.board, rig.pool, outside));
    CHECK_THROWS(std::invalid_argument, rig.view->board().wait(3, 0));
    CHECK_THROWS(std::invalid_argument, rig.view->board().free(kSlots));
}

// The last one: of all above.
TEST(nothing_is_left_on_the_device) {
    CHECK(fake.live() == 0);
}

}  // namespace
