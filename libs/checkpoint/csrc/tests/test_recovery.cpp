// Loads that go on without what a file cannot give: their owner brings it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "chunk.hpp"
#include "files.hpp"
#include "loads.hpp"
#include "reader.hpp"
#include "uring.hpp"

using namespace stoker;
using namespace loads;

namespace {

const Options kRecovering{.window = 0, .hold = false, .recover = true, .block_bytes = kBlock};

/// A file for each of `of_files`, which are positions out of `positions`: the owner has the others.
std::shared_ptr<Job> of_files(Loads& loads, std::uint32_t positions, const std::vector<std::uint32_t>& of_files,
                              const Options& options = kRecovering) {
    std::vector<std::unique_ptr<File>> files;
    std::vector<Extent> extents;
    std::vector<std::uint32_t> table;
    for (const std::uint32_t position : of_files) {
        extents.push_back({position, static_cast<std::uint32_t>(files.size()), 0, kChunkBytes});
        files.push_back(loads.file(kChunkBytes));
    }
    for (std::uint32_t position = 0; position < positions; ++position) {
        table.push_back(options.window > 0 ? position % options.window : position);
    }
    return Loads::of(std::move(files), std::move(extents), std::move(table), options);
}

const Failure kBroken{.kind = FailureKind::read_error, .file = 0, .offset = 4096, .error = EIO};

}  // namespace

TEST(a_load_of_nothing_but_the_owners_positions_reads_nothing) {
    Loads loads;
    const auto job = of_files(loads, 3, {});
    CHECK(job->spent() && !job->take() && job->unsettled() == 0);
    CHECK(!job->next_read(kLong) && !job->next_failed());
    job->publish(1);
    CHECK(readable(*job) && job->board().is_ready(1) && !job->board().is_ready(0));
    CHECK_THROWS(std::invalid_argument, job->publish(1));
    job->publish(2);
    CHECK(!job->ended());
    job->publish(0);
    CHECK(job->board().state() == State::done && job->join(0));
}

TEST(owners_and_files_positions_make_one_load) {
    Loads loads;
    const auto job = of_files(loads, 4, {1, 3});
    CHECK(job->unsettled() == 2);
    job->publish(0);
    CHECK_THROWS(std::invalid_argument, job->publish(1));  // the file's
    for (const Piece& piece : take_all(*job)) complete(*job, piece);
    CHECK(job->next_read(kLong) == 1U && job->next_read(kLong) == 3U && job->unsettled() == 2);
    job->publish(3);
    job->publish(1);
    CHECK(job->unsettled() == 0 && !job->next_read(kLong) && !job->ended());
    job->publish(2);
    CHECK(job->board().state() == State::done);
}

TEST(a_position_that_cannot_be_read_is_handed_over_once_none_of_its_pieces_is_in_flight) {
    Loads loads;
    const auto job = of_files(loads, 2, {0, 1});
    const Piece first = *job->take();
    const Piece second = *job->take();
    const Piece third = *job->take();
    CHECK(first.position == 0 && third.position == 0);
    job->give_up(second, kBroken);
    CHECK(!job->next_failed() && !job->ended() && !readable(*job));
    CHECK_THROWS(std::invalid_argument, job->publish(0));
    const auto next = job->take();
    CHECK(next && next->position == 1);  // the rest of the lost one is skipped
    complete(*job, first);
    job->give_up(third, {.kind = FailureKind::truncated, .offset = 8});
    CHECK(readable(*job) && job->unsettled() == 1);
    const auto failed = job->next_failed();
    CHECK(failed && failed->position == 0 && failed->failure.kind == FailureKind::read_error);  // the first one counts
    CHECK(failed->failure.offset == 4096 && failed->failure.error == EIO && failed->failure.file == 0);
    CHECK(!job->next_failed());
    complete(*job, *next);
    for (const Piece& piece : take_all(*job)) complete(*job, piece);
    CHECK(job->next_read(kLong) == 1U && !job->next_read(0));  // never the failed one
    job->publish(0);
    CHECK_THROWS(std::invalid_argument, job->publish(0));
    job->publish(1);
    CHECK(job->board().state() == State::done && job->join(0));
}

TEST(a_file_is_closed_when_its_position_is_given_up) {
    Loads loads;
    const auto job = of_files(loads, 3, {0, 1, 2}, {.recover = true, .block_bytes = 8 << 20});
    const std::size_t before = files::open_descriptors();
    const Piece first = *job->take();
    const Piece second = *job->take();
    CHECK(!job->file(first).open() && files::open_descriptors() == before + 1);
    job->give_up(first, kBroken);
    CHECK(files::open_descriptors() == before + 1);  // the other half is being read
    complete(*job, second);
    CHECK(files::open_descriptors() == before && job->next_failed());
    const Piece alone = *job->take();
    CHECK(alone.position == 1 && !job->file(alone).open());
    job->give_up(alone, kBroken);
    CHECK(files::open_descriptors() == before && job->next_failed());
}

TEST(a_file_that_is_changed_when_it_was_read_is_the_owners) {
    Loads loads;
    const std::string path = loads.directory.write({});
    CHECK(::truncate(path.c_str(), kChunkBytes) == 0);
    std::vector<std::unique_ptr<File>> one;
    one.push_back(std::make_unique<File>(path, kChunkBytes, -1));
    const auto job = Loads::of(std::move(one), {{0, 0, 0, kChunkBytes}}, {0}, kRecovering);
    const auto pieces = take_all(*job);
    for (std::size_t i = 0; i + 1 < pieces.size(); ++i) complete(*job, pieces[i]);
    CHECK(::truncate(path.c_str(), 100) == 0);
    complete(*job, pieces.back());
    const auto failed = job->next_failed();
    CHECK(failed && failed->failure.kind == FailureKind::truncated && failed->failure.offset == 100);
    CHECK(!job->next_read(0) && !job->ended());
    job->publish(0);
    CHECK(job->board().state() == State::done);
}

TEST(a_position_with_the_wrong_contents_is_handed_over_by_who_verified_it) {
    Loads loads;
    const auto job = of_files(loads, 2, {0});
    const Failure wrong{.kind = FailureKind::mismatch, .file = 0, .offset = 0};
    CHECK_THROWS(std::invalid_argument, job->reject(0, wrong));  // not read yet
    CHECK_THROWS(std::invalid_argument, job->reject(1, wrong));  // the owner's already
    CHECK_THROWS(std::invalid_argument, job->reject(2, wrong));
    for (const Piece& piece : take_all(*job)) complete(*job, piece);
    CHECK(job->next_read(kLong) == 0U);
    CHECK(readable(*job));
    job->reject(0, wrong);
    CHECK(readable(*job) && job->unsettled() == 0);
    const auto failed = job->next_failed();
    CHECK(failed && failed->position == 0 && failed->failure.kind == FailureKind::mismatch);
    CHECK_THROWS(std::invalid_argument, job->reject(0, wrong));
    job->publish(0);
    job->publish(1);
    CHECK(job->board().state() == State::done);

    const auto plain = loads.of_chunks(1, {.hold = true});
    for (const Piece& piece : take_all(*plain)) complete(*plain, piece);
    CHECK_THROWS(std::invalid_argument, plain->reject(0, wrong));
}

TEST(windows_hold_for_what_the_owner_brings_too) {
    Loads loads;
    const auto job = of_files(loads, 6, {1, 3}, {.window = 2, .recover = true, .block_bytes = kChunkBytes});
    const Piece first = *job->take();
    CHECK(first.position == 1 && !job->take() && !job->due());
    CHECK(job->window_open(0) && job->window_open(1) && !job->window_open(2));
    CHECK_THROWS(std::invalid_argument, job->window_open(6));
    CHECK_THROWS(std::invalid_argument, job->publish(2));  // its chunk is that of position 0
    job->publish(0);
    CHECK(!job->window_open(2));
    job->board().release(1);
    CHECK(job->window_open(2) && !job->window_open(3));
    job->publish(2);
    job->board().release(3);
    CHECK(!job->window_open(3) && !job->take());  // position 1 was released, but is not even there
    job->give_up(first, kBroken);
    CHECK(job->next_failed() && !job->window_open(3));
    job->publish(1);
    CHECK(job->window_open(3) && job->due() && job->window_open(4) && !job->window_open(5));
    const Piece third = *job->take();
    CHECK(third.position == 3 && job->spent());
    complete(*job, third);
    CHECK(job->next_read(kLong) == 3U);
    job->publish(3);
    job->publish(4);
    job->board().release(4);
    job->publish(5);
    CHECK(job->board().state() == State::done);
}

TEST(nothing_is_handed_over_after_the_end) {
    Loads loads;
    const auto job = of_files(loads, 3, {0, 1});
    const auto pieces = take_all(*job);
    for (std::size_t i = 1; i < 16; ++i) complete(*job, pieces[i]);
    job->give_up(pieces[0], kBroken);
    job->fail({.kind = FailureKind::source, .file = 1, .offset = 7});
    CHECK(!job->next_failed() && job->unsettled() == 0 && !job->join(0));
    job->publish(2);
    job->publish(0);
    job->reject(1, kBroken);
    for (std::size_t i = 16; i < pieces.size(); ++i) job->give_up(pieces[i], kBroken);
    CHECK(job->join(0) && job->board().ready_count() == 0);
    CHECK(job->board().failure().kind == FailureKind::source && job->board().failure().offset == 7);
}

TEST(extents_of_a_load_that_recovers_may_skip_positions_and_nothing_else) {
    Loads loads;
    const auto made = [&](std::vector<Extent> extents, std::vector<std::uint32_t> table) {
        std::vector<std::unique_ptr<File>> one;
        one.push_back(std::make_unique<File>("unused", kChunkBytes + 5000, -1));
        return Loads::of(std::move(one), std::move(extents), std::move(table), kRecovering);
    };
    CHECK(made({{1, 0, 0, 4096}, {3, 0, 8192, 4096}}, {0, 1, 2, 3, 4})->unsettled() == 2);
    CHECK_THROWS(std::invalid_argument, made({{3, 0, 0, 4096}, {1, 0, 8192, 4096}}, {0, 1, 2, 3}));
    CHECK_THROWS(std::invalid_argument, made({{4, 0, 0, 4096}}, {0, 1, 2, 3}));
    CHECK_THROWS(std::invalid_argument, made({{UINT32_MAX, 0, 0, 4096}}, {0}));
    CHECK_THROWS(std::invalid_argument, made({{0, 0, 100, 4096}}, {0}));
}

// By the engines, from real files.

namespace {

std::vector<std::string> engines() {
    if (io_uring_errno() == 0) return {"threads", "io_uring"};
    return {"threads"};
}

/// Position → what belongs there, half of it in files; of those some are missing, cut or hold something else.
struct Chunks {
    explicit Chunks(std::uint32_t positions) {
        for (std::uint32_t position = 0; position < positions; ++position) {
            const std::uint64_t size = position % 3 == 2 ? kChunkBytes / 4 + 5 : kChunkBytes / 8;
            bytes.push_back(files::pattern(position, size));
            spec.table.push_back(position);
            if (position % 2 == 0) add(position);
        }
        spec.recover = true;
    }

    void add(std::uint32_t position) {
        auto held = bytes[position];
        if (position % 8 == 2) held.resize(held.size() / 2);  // cut
        if (position % 8 == 4) held[held.size() / 3] ^= std::byte{1};
        std::string path = directory.write(held);
        if (position % 8 == 6) path += "-missing";
        const std::uint64_t size = bytes[position].size();
        spec.extents.push_back({position, static_cast<std::uint32_t>(spec.files.size()), 0,
                                (size + kAlignBytes - 1) / kAlignBytes * kAlignBytes});
        spec.files.push_back({path, size, -1});
    }

    bool right(const Pool& pool, std::uint32_t chunk, std::uint32_t position) const {
        return std::memcmp(pool.chunk_address(chunk), bytes[position].data(), bytes[position].size()) == 0;
    }

    void bring(const Pool& pool, std::uint32_t chunk, std::uint32_t position) const {
        std::memcpy(pool.chunk_address(chunk), bytes[position].data(), bytes[position].size());
    }

    /// What a verifying thread does.
    void verify(const Pool& pool, Job& job) const {
        while (job.unsettled() > 0) {
            const auto position = job.next_read(0.01);
            if (!position) continue;
            if (right(pool, job.board().table()[*position], *position)) {
                job.publish(*position);
            } else {
                job.reject(*position, {.kind = FailureKind::mismatch});
            }
        }
    }

    files::Directory directory;
    std::vector<std::vector<std::byte>> bytes;
    LoadSpec spec;
};

std::shared_ptr<Pool> pool_of(std::uint32_t chunks) {
    return Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 0});
}

}  // namespace

TEST(what_files_cannot_give_is_brought_by_the_owner_and_everything_is_right) {
    constexpr std::uint32_t kPositions = 12;
    const Chunks chunks(kPositions);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(kPositions);
        Reader reader(pool, engine, 4, 256 * 1024);
        const std::size_t before = files::open_descriptors();
        const auto job = reader.start(chunks.spec);
        std::thread first([&] { chunks.verify(*pool, *job); });
        std::thread second([&] { chunks.verify(*pool, *job); });
        std::thread owner([&] {
            for (std::uint32_t position = 1; position < kPositions; position += 2) {
                chunks.bring(*pool, position, position);
                job->publish(position);
            }
            std::set<std::uint32_t> brought;
            while (!job->ended()) {
                const auto failed = job->next_failed();
                if (!failed) continue;
                CHECK(brought.insert(failed->position).second);
                chunks.bring(*pool, failed->position, failed->position);
                job->publish(failed->position);
            }
            CHECK(brought == std::set<std::uint32_t>({2, 4, 6, 10}));
        });
        for (std::thread* const thread : {&first, &second, &owner}) thread->join();
        CHECK(job->join(kLong) && job->board().state() == State::done);
        for (std::uint32_t position = 0; position < kPositions; ++position) {
            CHECK(chunks.right(*pool, position, position));
        }
        CHECK(files::open_descriptors() <= before + 2 + 2);  // of the load, and of threads that were started
    }
}

TEST(a_window_streams_files_and_the_owners_positions_alike) {
    constexpr std::uint32_t kPositions = 12;
    constexpr std::uint32_t kWindow = 3;
    Chunks chunks(kPositions);
    chunks.spec.window = kWindow;
    for (std::uint32_t position = 0; position < kPositions; ++position) chunks.spec.table[position] = position % kWindow;
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(kWindow);
        Reader reader(pool, engine, 4, 256 * 1024);
        const auto job = reader.start(chunks.spec);
        std::thread verifier([&] { chunks.verify(*pool, *job); });
        std::thread owner([&] {
            std::set<std::uint32_t> wanted;
            for (std::uint32_t position = 1; position < kPositions; position += 2) wanted.insert(position);
            while (!job->ended()) {
                if (const auto failed = job->next_failed()) wanted.insert(failed->position);
                if (wanted.empty() || !job->window_open(*wanted.begin())) {
                    std::this_thread::yield();
                    continue;
                }
                const std::uint32_t position = wanted.extract(wanted.begin()).value();
                chunks.bring(*pool, position % kWindow, position);
                job->publish(position);
            }
        });
        for (std::uint32_t position = 0; position < kPositions; ++position) {
            CHECK(job->board().wait(position, kLong) && chunks.right(*pool, position % kWindow, position));
            job->board().release(position + 1);
        }
        verifier.join();
        owner.join();
        CHECK(job->join(kLong) && job->board().state() == State::done);
    }
}

// Whoever is first: nothing hangs, and no position becomes ready that is not right.
TEST(cancelling_and_failing_at_any_moment_ends_a_load_that_recovers) {
    constexpr std::uint32_t kPositions = 12;
    const Chunks chunks(kPositions);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(kPositions);
        Reader reader(pool, engine, 3, 256 * 1024);
        for (std::uint32_t round = 0; round < 12; ++round) {
            const auto job = reader.start(chunks.spec);
            std::atomic<std::uint32_t> published{0};
            std::thread verifier([&] { chunks.verify(*pool, *job); });
            std::thread owner([&] {
                for (std::uint32_t position = 1; position < kPositions && !job->ended(); position += 2) {
                    chunks.bring(*pool, position, position);
                    job->publish(position);
                    ++published;
                }
                while (!job->ended()) {
                    if (const auto failed = job->next_failed()) {
                        chunks.bring(*pool, failed->position, failed->position);
                        job->publish(failed->position);
                        ++published;
                    }
                }
            });
            while (published < round % 11 && !job->ended()) std::this_thread::yield();
            if (round % 2 == 0) {
                job->cancel();
            } else {
                job->fail({.kind = FailureKind::source, .file = 3, .offset = 9});
            }
            verifier.join();
            owner.join();
            CHECK(job->join(kLong) && !job->next_failed() && job->unsettled() == 0);
            const State state = job->board().state();
            CHECK(state == State::done || state == (round % 2 == 0 ? State::cancelled : State::failed));
            for (std::uint32_t position = 0; position < kPositions; ++position) {
                CHECK(!job->board().is_ready(position) || chunks.right(*pool, position, position));
            }
        }
    }
}
