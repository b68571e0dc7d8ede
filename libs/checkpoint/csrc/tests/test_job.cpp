#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "chunk.hpp"
#include "files.hpp"
#include "loads.hpp"

using namespace stoker;
using namespace loads;

TEST(pieces_come_in_file_order_and_cover_every_extent_once) {
    Loads loads;
    std::vector<std::unique_ptr<File>> two;
    two.push_back(loads.file(kChunkBytes + 5'000'000));
    two.push_back(loads.file(4097));
    const auto job = Loads::of(std::move(two),
                               {{0, 0, 4096, 3 * kBlock - 4096},
                                {0, 0, kChunkBytes - kBlock, kBlock},
                                {1, 0, kChunkBytes, 4'884 * 1024},
                                {2, 1, 0, 8192}},
                               {5, 3, 9});
    std::vector<Piece> pieces = take_all(*job);
    CHECK(pieces.size() == 3 + 1 + 5 + 1 && job->spent());
    const std::vector<std::uint64_t> offsets = {4096, 4096 + kBlock, 4096 + 2 * kBlock, kChunkBytes - kBlock};
    for (std::size_t i = 0; i < offsets.size(); ++i) {
        CHECK(pieces[i].offset == offsets[i] && pieces[i].chunk == 5 && pieces[i].position == 0 && pieces[i].file == 0);
    }
    CHECK(pieces[2].size == kBlock - 4096 && pieces[3].size == kBlock);
    std::uint64_t bytes = 0;
    for (const Piece& piece : pieces) bytes += piece.size;
    CHECK(bytes == 3 * kBlock - 4096 + kBlock + 4'884 * 1024 + 8192);
    CHECK(pieces.back().file == 1 && pieces.back().chunk == 9 && pieces.back().size == 8192);
}

TEST(a_position_is_ready_once_its_last_piece_is_complete_in_whatever_order) {
    Loads loads;
    const auto job = loads.of_chunks(2);
    const auto pieces = take_all(*job);
    CHECK(pieces.size() == 32);
    for (std::size_t i = pieces.size(); i-- > 0;) {
        CHECK(!job->board().is_ready(pieces[i].position) && !job->join(0));
        complete(*job, pieces[i]);
        CHECK(job->board().is_ready(1) == (i <= 16));
    }
    CHECK(job->board().state() == State::done && job->board().ready_count() == 2 && job->join(0));
    CHECK(readable(*job));
}

TEST(a_window_holds_back_what_its_consumer_has_not_released) {
    Loads loads;
    const auto job = loads.of_chunks(5, {.window = 2, .block_bytes = kChunkBytes});
    auto pieces = take_all(*job);
    CHECK(pieces.size() == 2 && !job->due() && !job->spent());
    complete(*job, pieces[0]);
    complete(*job, pieces[1]);
    CHECK(!job->take());
    job->board().release(1);
    CHECK(job->due());
    const auto third = job->take();
    CHECK(third && third->position == 2 && third->chunk == 0 && !job->take());
}

TEST(a_position_that_is_not_ready_holds_its_window_whatever_a_consumer_releases) {
    Loads loads;
    const auto job = loads.of_chunks(4, {.window = 2, .block_bytes = kChunkBytes});
    const auto pieces = take_all(*job);
    job->board().release(4);
    CHECK(!job->due() && !job->take());  // both chunks are being read into
    complete(*job, pieces[0]);
    const auto third = job->take();
    CHECK(third && third->position == 2 && !job->take());
    complete(*job, pieces[1]);
    complete(*job, *third);
    const auto fourth = job->take();
    CHECK(fourth && fourth->position == 3 && job->spent());
    complete(*job, *fourth);
    CHECK(job->board().state() == State::done);
}

TEST(held_positions_are_given_once_each_and_ready_when_published) {
    Loads loads;
    const auto job = loads.of_chunks(3, {.hold = true, .block_bytes = kChunkBytes});
    const auto pieces = take_all(*job);
    CHECK(!job->next_read(0));
    complete(*job, pieces[1]);
    CHECK(readable(*job) && job->next_read(kLong) == 1U && !job->next_read(0));
    CHECK_THROWS(std::invalid_argument, job->publish(0));  // not read yet
    CHECK_THROWS(std::invalid_argument, job->publish(3));
    CHECK(!job->board().is_ready(1));
    job->publish(1);
    CHECK(job->board().is_ready(1) && readable(*job));
    CHECK_THROWS(std::invalid_argument, job->publish(1));  // twice
    complete(*job, pieces[0]);
    complete(*job, pieces[2]);
    CHECK(!job->join(0));  // read, but not published
    CHECK(job->next_read(kLong) == 0U && job->next_read(kLong) == 2U);
    job->publish(2);
    CHECK(!job->ended());
    job->publish(0);
    CHECK(job->board().state() == State::done && job->join(0));
}

TEST(waiting_for_a_held_position_ends_with_the_load) {
    Loads loads;
    const auto job = loads.of_chunks(1, {.hold = true});
    std::thread canceller([&] { job->cancel(); });
    CHECK(!job->next_read(kLong));
    canceller.join();
    CHECK(job->board().state() == State::cancelled);
}

TEST(the_first_failure_counts_and_nothing_becomes_ready_after_it) {
    Loads loads;
    const auto job = loads.of_chunks(2, {.hold = true, .block_bytes = kChunkBytes});
    const auto pieces = take_all(*job);
    complete(*job, pieces[0]);
    job->fail({.kind = FailureKind::mismatch, .file = 0, .offset = 7});
    job->fail({.kind = FailureKind::read_error, .file = 0, .offset = 9, .error = EIO});
    job->cancel();
    job->publish(0);
    complete(*job, pieces[1]);
    CHECK(job->board().state() == State::failed && job->board().failure().kind == FailureKind::mismatch);
    CHECK(job->board().failure().offset == 7 && job->board().ready_count() == 0);
    CHECK(!job->next_read(0) && !job->take() && job->spent());
}

TEST(join_waits_for_pieces_in_flight_however_the_load_ended) {
    Loads loads;
    const auto job = loads.of_chunks(1);
    const Piece first = *job->take();
    const Piece second = *job->take();
    job->cancel();
    CHECK(readable(*job) && !job->join(0) && !job->take());
    complete(*job, first);
    CHECK(!readable(*job) && !job->join(0));
    job->abandon(second);
    CHECK(readable(*job) && job->join(0));
    CHECK(job->board().ready_count() == 0);
}

TEST(files_are_closed_when_read_and_when_their_load_has_ended) {
    Loads loads;
    std::vector<std::unique_ptr<File>> many;
    std::vector<Extent> extents;
    std::vector<std::uint32_t> table(20);
    std::iota(table.begin(), table.end(), 0U);
    for (std::uint32_t i = 0; i < 20; ++i) {
        many.push_back(loads.file(4096));
        extents.push_back({i, i, 0, 4096});
    }
    const auto job = Loads::of(std::move(many), std::move(extents), table);
    const std::size_t before = files::open_descriptors();
    for (int i = 0; i < 15; ++i) complete(*job, *job->take());
    CHECK(files::open_descriptors() == before);
    const Piece piece = *job->take();
    CHECK(!job->file(piece).open() && files::open_descriptors() == before + 1);
    job->cancel();
    CHECK(files::open_descriptors() == before + 1);
    job->abandon(piece);
    CHECK(files::open_descriptors() == before);
}

TEST(an_open_file_waits_for_its_disk) {
    Loads loads;
    const auto file = loads.file(4096);
    CHECK(!file->open());
    const int flags = ::fcntl(file->fd(), F_GETFL);
    CHECK((flags & O_NONBLOCK) == 0 && ((flags & O_DIRECT) != 0) == file->direct());
}

TEST(a_file_that_changes_while_it_is_read_never_has_its_last_position_published) {
    Loads loads;
    const std::string path = loads.directory.write({});
    CHECK(::truncate(path.c_str(), 2 * kChunkBytes) == 0);
    for (const off_t size : {off_t{3 * kChunkBytes}, off_t{100}}) {
        CHECK(::truncate(path.c_str(), 2 * kChunkBytes) == 0);
        std::vector<std::unique_ptr<File>> one;
        one.push_back(std::make_unique<File>(path, 2 * kChunkBytes, -1));
        const auto job = Loads::of(std::move(one), {{0, 0, 0, kChunkBytes}, {1, 0, kChunkBytes, kChunkBytes}}, {0, 1},
                                   {.block_bytes = kChunkBytes});
        complete(*job, *job->take());
        CHECK(::truncate(path.c_str(), size) == 0);
        job->complete(*job->take());
        const Failure failure = job->board().failure();
        CHECK(job->board().is_ready(0) && !job->board().is_ready(1));
        CHECK(failure.kind == (size == 100 ? FailureKind::truncated : FailureKind::changed));
        CHECK(failure.offset == (size == 100 ? 100 : 0));
    }
}

TEST(extents_that_break_the_rules_are_refused) {
    Loads loads;
    const auto refused = [&](std::vector<Extent> extents, std::vector<std::uint32_t> table) {
        std::vector<std::unique_ptr<File>> one;
        one.push_back(std::make_unique<File>("unused", kChunkBytes + 5000, -1));
        CHECK_THROWS(std::invalid_argument, Loads::of(std::move(one), std::move(extents), std::move(table)));
    };
    refused({}, {0});                                             // a position without extents
    refused({{0, 0, 0, 4096}, {2, 0, 8192, 4096}}, {0, 1, 2});    // and in the middle
    refused({{0, 0, 0, 4096}}, {0, 1});                           // and at the end
    refused({{1, 0, 0, 4096}, {0, 0, 8192, 4096}}, {0, 1});       // descending
    refused({{0, 0, 0, 4096}, {1, 0, 8192, 4096}}, {0});          // no such position
    refused({{UINT32_MAX, 0, 0, 4096}}, {0});
    refused({{0, 1, 0, 4096}}, {0});                              // no such file
    refused({{0, 0, 100, 4096}}, {0});                            // not aligned
    refused({{0, 0, 0, 100}}, {0});
    refused({{0, 0, 0, 0}}, {0});
    refused({{0, 0, kChunkBytes - 4096, 8192}}, {0});             // leaves its chunk
    refused({{0, 0, kChunkBytes, 12288}}, {0});                   // past the end by a block and more
    refused({{0, 0, kChunkBytes + 8192, 4096}}, {0});
    refused({{0, 0, UINT64_MAX - 4095, 4096}}, {0});
}
