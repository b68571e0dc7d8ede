#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "board.hpp"
#include "check.hpp"
#include "pool.hpp"
#include "view.hpp"

using namespace stoker;

namespace {

using Table = std::vector<std::uint32_t>;

constexpr double kLong = 60;  // seconds: only a failure takes that long

std::shared_ptr<Board> board_of(std::uint32_t positions) {
    Table table(positions);
    std::iota(table.begin(), table.end(), 0U);
    return Board::create(table, 0);
}

}  // namespace

TEST(whoever_opens_a_board_sees_what_its_maker_wrote) {
    const auto made = Board::create({4, 7, 4, 7, 4}, 2);
    const auto opened = Board::open(made->fd());
    CHECK(opened->positions() == 5 && opened->window() == 2 && opened->table() == (Table{4, 7, 4, 7, 4}));
    CHECK(opened->state() == State::loading && opened->ready_count() == 0 && !opened->is_ready(3));
    made->mark_ready(3);
    CHECK(opened->is_ready(3) && !opened->is_ready(2) && opened->ready_count() == 1);
    opened->release(2);
    CHECK(made->released() == 2);
    made->finish(State::failed, {.kind = FailureKind::read_error, .file = 3, .offset = 1ULL << 40, .error = 5});
    const Failure failure = opened->failure();
    CHECK(opened->state() == State::failed && failure.kind == FailureKind::read_error && failure.file == 3);
    CHECK(failure.offset == 1ULL << 40 && failure.error == 5);
}

TEST(a_board_lives_on_in_whoever_opened_it) {
    auto made = board_of(70);
    const auto opened = Board::open(made->fd());
    made->mark_ready(69);
    made.reset();
    CHECK(opened->is_ready(69) && opened->ready_count() == 1);
}

TEST(tables_that_are_empty_or_break_their_window_are_refused) {
    CHECK_THROWS(std::invalid_argument, Board::create({}, 0));
    CHECK_THROWS(std::invalid_argument, Board::create({1}, 2));
    CHECK_THROWS(std::invalid_argument, Board::create({1, 2, 1, 3}, 2));
}

TEST(what_is_no_board_is_not_opened) {
    const Fd small = create_sealed("small", 8);
    CHECK_THROWS(std::invalid_argument, Board::open(small.get()));
    const Fd zeros = create_sealed("zeros", 4096);
    CHECK_THROWS(std::invalid_argument, Board::open(zeros.get()));
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    CHECK_THROWS(std::invalid_argument, Board::open(null.get()));
    CHECK_THROWS(std::system_error, Board::open(-1));
}

TEST(a_board_with_a_damaged_head_is_not_opened) {
    // Magic, version, positions, window: none may be another number.
    for (const off_t at : {0, 8, 12, 16}) {
        const auto board = board_of(3);
        CHECK(Board::open(board->fd()) != nullptr);
        const std::uint32_t wrong = 0xffffffff;
        CHECK(::pwrite(board->fd(), &wrong, sizeof(wrong), at) == sizeof(wrong));
        CHECK_THROWS(std::invalid_argument, Board::open(board->fd()));
    }
    const auto board = board_of(3);
    const std::uint32_t none = 0;
    CHECK(::pwrite(board->fd(), &none, sizeof(none), 12) == sizeof(none));
    CHECK_THROWS(std::invalid_argument, Board::open(board->fd()));
}

TEST(nobody_can_resize_a_board) {
    const auto board = board_of(3);
    CHECK(::ftruncate(board->fd(), 0) != 0 && errno == EPERM);
}

TEST(positions_that_do_not_exist_are_refused) {
    const auto board = board_of(3);
    CHECK_THROWS(std::invalid_argument, (board->mark_ready(3), 0));
    CHECK_THROWS(std::invalid_argument, board->is_ready(3));
    CHECK_THROWS(std::invalid_argument, board->wait(3, 0));
    CHECK_THROWS(std::invalid_argument, (board->release(4), 0));
    board->release(3);
    CHECK(board->released() == 3);
}

TEST(waiting_ends_when_the_position_is_ready) {
    const auto board = board_of(2);
    std::vector<std::byte> chunk(4096);
    const std::jthread reader([&] {
        std::fill(chunk.begin(), chunk.end(), std::byte{3});
        board->mark_ready(1);
    });
    CHECK(board->wait(1, kLong));
    CHECK(chunk.front() == std::byte{3} && chunk.back() == std::byte{3});  // what was read happened before
}

TEST(waiting_ends_with_its_timeout) {
    const auto board = board_of(2);
    const auto start = std::chrono::steady_clock::now();
    CHECK(!board->wait(0, 0));
    CHECK(!board->wait(0, -1));
    CHECK(!board->wait(0, 0.05));
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    CHECK(waited.count() >= 0.05 && waited.count() < 10);
    board->mark_ready(0);
    CHECK(board->wait(0, 0));
}

TEST(waiting_ends_when_the_load_does) {
    for (const State end : {State::failed, State::cancelled, State::done}) {
        const auto board = board_of(2);
        const auto consumer = Board::open(board->fd());
        const std::jthread reader([&] {
            board->mark_ready(0);
            board->finish(end);
        });
        CHECK(!consumer->wait(1, kLong));
        CHECK(consumer->wait(0, 0));  // ready stays ready
    }
}

TEST(news_of_other_positions_does_not_end_waiting) {
    const auto board = board_of(1000);
    std::atomic<bool> last{false};
    const std::jthread reader([&] {
        for (std::uint32_t position = 0; position < 999; ++position) board->mark_ready(position);
        last = true;
        board->mark_ready(999);
    });
    CHECK(board->wait(999, kLong));
    CHECK(last);
}

TEST(every_change_moves_the_word_that_consumers_sleep_on) {
    // So a change between a consumer's look and its sleep makes the kernel refuse the sleep: no wake-up is missed.
    const auto board = board_of(2);
    const auto word = [&] {
        std::uint32_t event = 0;
        CHECK(::pread(board->fd(), &event, sizeof(event), 20) == sizeof(event));
        return event;
    };
    const std::uint32_t before = word();
    board->mark_ready(0);
    const std::uint32_t marked = word();
    CHECK(marked != before);
    board->finish(State::cancelled);
    CHECK(word() != marked && word() != before);
}

TEST(two_boards_can_play_ping_pong) {
    constexpr std::uint32_t positions = 3000;
    const auto there = board_of(positions);
    const auto back = board_of(positions);
    const std::jthread echo([&] {
        const auto opened = Board::open(there->fd());
        for (std::uint32_t position = 0; position < positions; ++position) {
            CHECK(opened->wait(position, kLong));
            back->mark_ready(position);
        }
    });
    const auto start = std::chrono::steady_clock::now();
    for (std::uint32_t position = 0; position < positions; ++position) {
        there->mark_ready(position);
        CHECK(back->wait(position, kLong));
    }
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(50));  // a missed wake-up costs kLong
}

TEST(a_position_counts_once_however_often_it_is_marked) {
    constexpr std::uint32_t positions = 500;
    const auto board = board_of(positions);
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (std::uint32_t position = 0; position < positions; ++position) board->mark_ready(position);
        });
    }
    threads.clear();
    CHECK(board->ready_count() == positions);
}

TEST(the_first_end_wins) {
    constexpr std::size_t rounds = 500;
    constexpr std::uint32_t enders = 2;
    std::vector<std::shared_ptr<Board>> boards;
    for (std::size_t round = 0; round < rounds; ++round) boards.push_back(board_of(1));
    std::vector<std::atomic<std::uint32_t>> winners(rounds);
    std::atomic<std::size_t> arrived{0};
    std::vector<std::jthread> threads;
    for (std::uint32_t file = 1; file <= enders; ++file) {
        threads.emplace_back([&, file] {
            for (std::size_t round = 0; round < rounds; ++round) {
                for (++arrived; arrived < (round + 1) * enders;) std::this_thread::yield();
                const Failure failure{.kind = FailureKind::mismatch, .file = file, .offset = file, .error = 0};
                if (boards[round]->finish(State::failed, failure)) CHECK(winners[round].exchange(file) == 0);
            }
        });
    }
    threads.clear();
    for (std::size_t round = 0; round < rounds; ++round) {
        const Failure failure = boards[round]->failure();
        CHECK(winners[round] != 0 && failure.file == winners[round] && failure.offset == winners[round]);
        CHECK(!boards[round]->finish(State::done) && boards[round]->state() == State::failed);
    }
}

TEST(a_board_that_did_not_fail_names_no_failure) {
    const auto board = board_of(1);
    CHECK(board->failure().kind == FailureKind::none);
    board->finish(State::cancelled, {.kind = FailureKind::changed, .file = 1});
    CHECK(board->failure().kind == FailureKind::none && board->failure().file == 0);
}

TEST(releases_never_go_back) {
    const auto board = board_of(8);
    board->release(5);
    board->release(2);
    CHECK(board->released() == 5);
}

TEST(another_process_waits_for_what_this_one_reads) {
    constexpr std::uint32_t chunks = 3;
    const auto pool = Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 0});
    const Fd reader = pool->reader_fd();
    const auto board = board_of(chunks);
    const pid_t child = ::fork();
    if (child == 0) {
        const auto opened = Board::open(board->fd());
        const View view(reader.get(), opened->table());
        bool held = true;
        for (std::uint32_t position = 0; position < chunks; ++position) {
            held = held && opened->wait(position, kLong);
            const auto* const bytes = view.data() + position * kChunkBytes;
            const auto byte = static_cast<std::byte>(position + 1);
            held = held && std::all_of(bytes, bytes + kChunkBytes, [=](std::byte b) { return b == byte; });
            opened->release(position + 1);
        }
        ::_exit(held ? 0 : 1);
    }
    for (std::uint32_t position = 0; position < chunks; ++position) {
        std::fill_n(pool->chunk_address(position), kChunkBytes, static_cast<std::byte>(position + 1));
        board->mark_ready(position);
        while (board->released() <= position) std::this_thread::yield();  // bounded by main's alarm
    }
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
}

TEST(a_consumer_killed_while_it_waits_harms_nobody) {
    const auto board = board_of(2);
    const auto wait_for_last = [&] {
        const auto opened = Board::open(board->fd());
        opened->release(1);  // tells that it is here
        ::_exit(opened->wait(1, kLong) ? 0 : 1);
    };
    const pid_t victim = ::fork();
    if (victim == 0) wait_for_last();
    while (board->released() < 1) std::this_thread::yield();
    ::kill(victim, SIGKILL);
    int status = -1;
    CHECK(::waitpid(victim, &status, 0) == victim && WIFSIGNALED(status));

    const pid_t heir = ::fork();
    if (heir == 0) wait_for_last();
    board->mark_ready(0);
    board->mark_ready(1);
    CHECK(::waitpid(heir, &status, 0) == heir && status == 0);
    CHECK(board->finish(State::done) && board->ready_count() == 2);
}
