// Loads of real files by both engines.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "chunk.hpp"
#include "files.hpp"
#include "reader.hpp"
#include "uring.hpp"

using namespace stoker;

namespace {

constexpr double kLong = 60;  // seconds: only a failure takes that long
constexpr std::uint32_t kBlock = 256 * 1024;

std::shared_ptr<Pool> pool_of(std::uint32_t chunks) {
    return Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 0});
}

std::vector<std::string> engines() {
    if (io_uring_errno() == 0) return {"threads", "io_uring"};
    std::fprintf(stderr, "  no io_uring: threads only\n");
    return {"threads"};
}

std::uint64_t up(std::uint64_t size) { return (size + kAlignBytes - 1) / kAlignBytes * kAlignBytes; }

/// Adds the whole of a file, as positions that follow the last ones.
void add_file(LoadSpec& spec, const std::string& path, std::uint64_t size) {
    auto position = spec.extents.empty() ? 0 : spec.extents.back().position + 1;
    const auto file = static_cast<std::uint32_t>(spec.files.size());
    spec.files.push_back({path, size, files::mtime_ns(path)});
    for (std::uint64_t offset = 0; offset < size; offset += kChunkBytes, ++position) {
        spec.extents.push_back({position, file, offset, up(std::min<std::uint64_t>(size - offset, kChunkBytes))});
    }
}

std::uint32_t positions_of(const LoadSpec& spec) { return spec.extents.back().position + 1; }

/// Chunks first, first + 1, …; with a window: `window` of them, again and again.
LoadSpec& place(LoadSpec& spec, std::uint32_t first = 0, std::uint32_t window = 0) {
    spec.window = window;
    spec.table.clear();
    for (std::uint32_t position = 0; position < positions_of(spec); ++position) {
        spec.table.push_back(first + (window > 0 ? position % window : position));
    }
    return spec;
}

LoadSpec whole_file(const std::string& path, std::uint64_t size) {
    LoadSpec spec;
    add_file(spec, path, size);
    return place(spec);
}

/// The bytes of the file that this extent asked for are where they belong.
bool holds(const Pool& pool, std::uint32_t chunk, const Extent& extent, const std::vector<std::byte>& bytes) {
    const std::uint64_t size = std::min(extent.size, bytes.size() - extent.offset);
    const std::byte* const there = pool.chunk_address(chunk) + extent.offset % kChunkBytes;
    return std::memcmp(there, bytes.data() + extent.offset, size) == 0;
}

bool ended_as(Job& job, State state) { return job.join(kLong) && job.board().state() == state; }

}  // namespace

TEST(every_byte_of_a_file_lands_where_it_belongs) {
    files::Directory directory;
    const std::vector<std::uint64_t> sizes = {1, 4096, 4097, 2 * kChunkBytes + 12'345};
    for (const std::uint64_t size : sizes) {
        const auto bytes = files::pattern(size, size);
        const LoadSpec spec = whole_file(directory.write(bytes), size);
        for (const std::string& engine : engines()) {
            for (const std::uint32_t block_bytes : {4096U, kBlock, static_cast<std::uint32_t>(kChunkBytes)}) {
                if (block_bytes == 4096 && size > kChunkBytes) continue;
                const auto pool = pool_of(3);
                Reader reader(pool, engine, 4, block_bytes);
                const auto job = reader.start(spec);
                CHECK(ended_as(*job, State::done));
                CHECK(job->read_bytes() == size && job->board().ready_count() == positions_of(spec));
                for (const Extent& extent : spec.extents) CHECK(holds(*pool, extent.position, extent, bytes));
            }
        }
    }
}

TEST(chunks_that_are_warm_are_read_into_again_and_again) {
    files::Directory directory;
    const std::uint64_t size = 2 * kChunkBytes - 1;
    for (const std::string& engine : engines()) {
        const auto pool = Pool::create(3, {.huge = Huge::automatic, .lock = false, .fault_threads = 1});
        CHECK(pool->wait_warm(kLong));
        Reader reader(pool, engine, 4, kBlock);
        std::fprintf(stderr, "  %s, registered: %d\n", engine.c_str(), reader.registered_buffers());
        for (std::uint64_t seed = 40; seed < 43; ++seed) {
            const auto bytes = files::pattern(seed, size);
            LoadSpec spec = whole_file(directory.write(bytes), size);
            const auto job = reader.start(place(spec, seed % 2));
            CHECK(ended_as(*job, State::done));
            for (const Extent& extent : spec.extents) CHECK(holds(*pool, spec.table[extent.position], extent, bytes));
        }
    }
}

TEST(only_the_extents_are_read) {
    files::Directory directory;
    const std::uint64_t size = kChunkBytes + 100'000;
    const auto bytes = files::pattern(7, size);
    LoadSpec spec;
    const std::string path = directory.write(bytes);
    spec.files = {{path, size, files::mtime_ns(path)}};
    spec.extents = {{0, 0, 8192, 4096}, {0, 0, 1 << 20, 3 * kBlock + 4096}, {1, 0, kChunkBytes + 4096, 8192}};
    spec.table = {1, 0};
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(2);
        Reader reader(pool, engine, 3, kBlock);
        const auto job = reader.start(spec);
        CHECK(ended_as(*job, State::done) && job->read_bytes() == 4096 + 3 * kBlock + 4096 + 8192);
        for (const Extent& extent : spec.extents) CHECK(holds(*pool, spec.table[extent.position], extent, bytes));
        std::vector<std::byte> zeros(8192);
        CHECK(std::memcmp(pool->chunk_address(1), zeros.data(), 8192) == 0);
        CHECK(std::memcmp(pool->chunk_address(1) + 12288, zeros.data(), 8192) == 0);
    }
}

TEST(many_tiny_files_are_read_with_few_of_them_open) {
    files::Directory directory;
    constexpr std::uint32_t kFiles = 200;
    std::vector<std::vector<std::byte>> bytes;
    LoadSpec spec;
    for (std::uint32_t i = 0; i < kFiles; ++i) {
        bytes.push_back(files::pattern(i, 1 + i * 97));
        add_file(spec, directory.write(bytes.back()), bytes.back().size());
    }
    place(spec);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(kFiles);
        Reader reader(pool, engine, 4, kBlock);
        const std::size_t before = files::open_descriptors();
        const auto job = reader.start(spec);
        std::size_t most = 0;
        while (!job->join(0)) most = std::max(most, files::open_descriptors() - before);
        CHECK(ended_as(*job, State::done) && most <= 2 + 4);  // the load's own two, and the reads in flight
        for (std::uint32_t i = 0; i < kFiles; ++i) CHECK(holds(*pool, i, spec.extents[i], bytes[i]));
        CHECK(files::open_descriptors() == before + 2);
    }
}

TEST(a_file_that_is_not_there_or_no_file_ends_the_load_with_its_errno) {
    files::Directory directory;
    const std::string good = directory.write(files::pattern(1, 4096));
    const std::string fifo = directory.path() + "/fifo";
    CHECK(::mkfifo(fifo.c_str(), 0600) == 0);
    const std::vector<std::pair<std::string, int>> cases = {
        {directory.path() + "/missing", ENOENT}, {directory.path(), EISDIR}, {fifo, EINVAL}, {"/dev/zero", EINVAL}};
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(2);
        Reader reader(pool, engine, 2, kBlock);
        for (const auto& [path, error] : cases) {
            LoadSpec spec = whole_file(good, 4096);
            spec.files.push_back({path, 4096, -1});
            spec.extents.push_back({1, 1, 0, 4096});
            const auto job = reader.start(place(spec));
            CHECK(ended_as(*job, State::failed));
            const Failure failure = job->board().failure();
            CHECK(failure.kind == FailureKind::read_error && failure.file == 1 && failure.error == error);
        }
        const auto after = reader.start(whole_file(good, 4096));  // one bad load is an error to that load alone
        CHECK(ended_as(*after, State::done));
    }
    ::unlink(fifo.c_str());
}

TEST(a_file_of_another_size_or_time_is_refused_before_it_is_read) {
    files::Directory directory;
    const std::string path = directory.write(files::pattern(1, 100'000));
    const std::int64_t mtime_ns = files::mtime_ns(path);
    struct Case {
        std::uint64_t size;
        std::int64_t mtime_ns;
        FailureKind kind;
        std::uint64_t offset;
    };
    const std::vector<Case> cases = {{100'001, mtime_ns, FailureKind::truncated, 100'000},
                                     {99'999, mtime_ns, FailureKind::changed, 0},
                                     {100'000, mtime_ns - 1, FailureKind::changed, 0},
                                     {100'000, -1, FailureKind::none, 0}};
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(1);
        Reader reader(pool, engine, 2, kBlock);
        for (const Case& c : cases) {
            LoadSpec spec = whole_file(path, c.size);
            spec.files[0].mtime_ns = c.mtime_ns;
            const auto job = reader.start(spec);
            CHECK(job->join(kLong));
            const Failure failure = job->board().failure();
            CHECK(failure.kind == c.kind && failure.offset == c.offset && failure.file == 0);
            CHECK((job->read_bytes() == 0) == (c.kind != FailureKind::none));
        }
    }
}

// The window keeps the load from going on until the file is what the test wants it to be.
TEST(a_file_cut_or_rewritten_in_mid_load_ends_it) {
    files::Directory directory;
    const std::uint64_t size = 3 * kChunkBytes;
    const auto bytes = files::pattern(3, size);
    for (const std::string& engine : engines()) {
        for (const bool cut : {true, false}) {
            const std::string path = directory.write(bytes);
            const auto pool = pool_of(1);
            Reader reader(pool, engine, 4, kBlock);
            LoadSpec spec = whole_file(path, size);
            const auto job = reader.start(place(spec, 0, 1));
            CHECK(job->board().wait(0, kLong));
            if (cut) {
                CHECK(::truncate(path.c_str(), kChunkBytes + 100) == 0);
            } else {
                const Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
                CHECK(::pwrite(fd.get(), "x", 1, 0) == 1);
            }
            for (std::uint32_t position = 0; position < 3 && job->board().wait(position, kLong); ++position) {
                job->board().release(position + 1);
            }
            CHECK(ended_as(*job, State::failed) && job->board().ready_count() < 3);
            const Failure failure = job->board().failure();
            CHECK(failure.kind == (cut ? FailureKind::truncated : FailureKind::changed) && failure.file == 0);
            // The first block that meets the end says so; one behind it may be the first to be answered.
            if (cut) CHECK(failure.offset >= kChunkBytes + 100 && failure.offset < 2 * kChunkBytes);
        }
    }
}

// Nothing is mapped at address 0, so the kernel itself answers EIO. Below the check for regular files, hence by hand.
TEST(an_error_of_the_kernel_ends_the_load_with_its_errno_and_offset) {
    for (const std::string& name : engines()) {
        const auto pool = pool_of(1);
        std::vector<std::unique_ptr<File>> memory;
        memory.push_back(std::make_unique<File>(Fd(::open("/proc/self/mem", O_RDONLY | O_CLOEXEC)), 16384, false));
        const auto job = std::make_shared<Job>(std::move(memory), std::vector<Extent>{{0, 0, 4096, 8192}},
                                               Board::create({0}, 0), 4096, false);
        const Source source = [&]() -> std::optional<Read> {
            if (const auto piece = job->take()) return Read(job, *piece);
            return std::nullopt;
        };
        const auto engine =
            name == "threads" ? make_threads_engine(source, *pool, 1) : make_uring_engine(source, *pool, 1);
        engine->start();
        engine->wake();
        CHECK(ended_as(*job, State::failed) && !job->direct());
        const Failure failure = job->board().failure();
        CHECK(failure.kind == FailureKind::read_error && failure.error == EIO && failure.offset == 4096);
    }
}

// /dev/shm is a tmpfs: depending on the kernel it refuses O_DIRECT at open or not at all.
TEST(a_file_system_without_o_direct_is_read_all_the_same) {
    char path[] = "/dev/shm/stoker-native-XXXXXX";
    const Fd fd(::mkstemp(path));
    if (fd.get() < 0) SKIP("no /dev/shm");
    const auto bytes = files::pattern(5, 3'000'001);
    CHECK(::write(fd.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(1);
        Reader reader(pool, engine, 4, kBlock);
        const LoadSpec spec = whole_file(path, bytes.size());
        const auto job = reader.start(spec);
        CHECK(ended_as(*job, State::done) && holds(*pool, 0, spec.extents[0], bytes));
    }
    ::unlink(path);
}

// An odd address is what O_DIRECT refuses and the page cache does not care about.
TEST(a_read_that_is_refused_as_o_direct_is_made_again_through_the_page_cache) {
    files::Directory directory;
    const auto bytes = files::pattern(6, 100'000);
    const std::string path = directory.write(bytes);
    const Fd probe(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
    std::byte byte{};
    if (probe.get() < 0 || ::pread(probe.get(), &byte, 1, 1) != -1) SKIP("O_DIRECT takes odd reads here");
    std::vector<std::unique_ptr<File>> one;
    one.push_back(std::make_unique<File>(path, bytes.size(), -1));
    const auto job = std::make_shared<Job>(std::move(one), std::vector<Extent>{{0, 0, 0, up(bytes.size())}},
                                           Board::create({0}, 0), 1 << 20, false);
    Read read(job, *job->take());
    CHECK(read.begin() && job->direct());
    std::vector<std::byte> target(up(bytes.size()) + 1);
    const auto pread = [&] {
        const ssize_t count = ::pread(read.fd(), target.data() + 1, read.size(), static_cast<off_t>(read.offset()));
        return count >= 0 ? count : -errno;
    };
    CHECK(read.on_result(pread()) && !job->direct());
    CHECK(!read.on_result(pread()));
    CHECK(std::equal(bytes.begin(), bytes.end(), target.begin() + 1) && ended_as(*job, State::done));
}

TEST(a_window_of_two_chunks_streams_a_larger_file_through) {
    files::Directory directory;
    const std::uint64_t size = 7 * kChunkBytes + 999;
    const auto bytes = files::pattern(8, size);
    LoadSpec spec = whole_file(directory.write(bytes), size);
    place(spec, 1, 2);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(3);
        Reader reader(pool, engine, 4, 1 << 20);
        const auto job = reader.start(spec);
        std::thread consumer([&] {
            Board& board = job->board();  // not another mapping of it: TSan would not know that they are one
            for (std::uint32_t position = 0; position < board.positions(); ++position) {
                CHECK(board.wait(position, kLong));
                CHECK(holds(*pool, board.table()[position], spec.extents[position], bytes));
                board.release(position + 1);
            }
        });
        consumer.join();
        CHECK(ended_as(*job, State::done) && job->read_bytes() == size);
    }
}

TEST(a_load_whose_window_is_full_lets_others_pass_and_can_be_cancelled) {
    files::Directory directory;
    const std::uint64_t size = 3 * kChunkBytes;
    const auto bytes = files::pattern(9, size);
    const std::string path = directory.write(bytes);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(4);
        Reader reader(pool, engine, 2, 1 << 20);
        LoadSpec blocked = whole_file(path, size);
        place(blocked, 0, 1).priority = 5;
        const auto stuck = reader.start(blocked);
        CHECK(stuck->board().wait(0, kLong));
        LoadSpec other = whole_file(path, size);
        const auto job = reader.start(place(other, 1));
        CHECK(ended_as(*job, State::done) && stuck->board().ready_count() == 1);
        stuck->cancel();
        CHECK(ended_as(*stuck, State::cancelled));
    }
}

TEST(held_positions_are_published_by_whoever_verified_them) {
    files::Directory directory;
    const std::uint64_t size = 3 * kChunkBytes + 5;
    const auto bytes = files::pattern(10, size);
    LoadSpec spec = whole_file(directory.write(bytes), size);
    spec.hold = true;
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(4);
        Reader reader(pool, engine, 4, 1 << 20);
        const auto job = reader.start(spec);
        std::thread verifier([&] {
            while (const auto position = job->next_read(kLong)) {
                CHECK(!job->board().is_ready(*position) && holds(*pool, *position, spec.extents[*position], bytes));
                job->publish(*position);
            }
        });
        verifier.join();
        CHECK(ended_as(*job, State::done) && job->board().ready_count() == 4);

        const auto bad = reader.start(spec);
        const auto position = bad->next_read(kLong);
        CHECK(position.has_value());
        bad->fail({.kind = FailureKind::mismatch, .file = 0, .offset = *position * kChunkBytes});
        CHECK(ended_as(*bad, State::failed) && bad->board().ready_count() == 0);
    }
}

TEST(loads_share_one_reader_and_each_gets_its_own_bytes) {
    files::Directory directory;
    const std::uint64_t size = kChunkBytes + 77;
    std::vector<std::vector<std::byte>> bytes;
    std::vector<LoadSpec> specs;
    for (std::uint32_t i = 0; i < 4; ++i) {
        bytes.push_back(files::pattern(20 + i, size));
        specs.push_back(whole_file(directory.write(bytes.back()), size));
        place(specs.back(), 2 * i);
    }
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(8);
        Reader reader(pool, engine, 3, kBlock);
        std::vector<std::shared_ptr<Job>> jobs(4);
        std::vector<std::thread> callers;
        for (std::uint32_t i = 0; i < 4; ++i) callers.emplace_back([&, i] { jobs[i] = reader.start(specs[i]); });
        for (std::thread& caller : callers) caller.join();
        for (std::uint32_t i = 0; i < 4; ++i) {
            CHECK(ended_as(*jobs[i], State::done));
            for (const Extent& extent : specs[i].extents) {
                CHECK(holds(*pool, specs[i].table[extent.position], extent, bytes[i]));
            }
        }
    }
}

// Four loads write to one chunk, each one block less than the one expected before it: every block then holds the file
// of its last reader. A long load goes before them, so that they wait together.
TEST(the_highest_priority_is_read_first_then_the_first_to_come) {
    files::Directory directory;
    const std::uint64_t long_size = 4 * kChunkBytes;
    LoadSpec before = whole_file(directory.write(files::pattern(1, long_size)), long_size);
    before.priority = 9;
    struct Small {
        int priority;
        std::uint32_t blocks;
        std::vector<std::byte> bytes;
        LoadSpec spec;
    };
    std::vector<Small> small = {{0, 1, {}, {}}, {2, 4, {}, {}}, {1, 2, {}, {}}, {2, 3, {}, {}}};  // in order of arrival
    for (Small& load : small) {
        load.bytes = files::pattern(30 + load.blocks, load.blocks * kAlignBytes);
        load.spec = whole_file(directory.write(load.bytes), load.bytes.size());
        place(load.spec, 4).priority = load.priority;
    }
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(5);
        Reader reader(pool, engine, 1, 64 * 1024);
        bool waited_together = false;
        for (int attempt = 0; attempt < 5 && !waited_together; ++attempt) {
            const auto first = reader.start(before);
            std::vector<std::shared_ptr<Job>> jobs;
            for (const Small& load : small) jobs.push_back(reader.start(load.spec));
            waited_together = !first->ended();
            for (const auto& job : jobs) CHECK(ended_as(*job, State::done));
        }
        CHECK(waited_together);
        for (const Small& load : small) {
            const std::uint64_t last = (load.blocks - 1) * kAlignBytes;
            CHECK(std::memcmp(pool->chunk_address(4) + last, load.bytes.data() + last, kAlignBytes) == 0);
        }
    }
}

TEST(a_cancelled_load_begins_no_more_reads) {
    files::Directory directory;
    const std::uint64_t size = 4 * kChunkBytes;
    const LoadSpec spec = whole_file(directory.write(files::pattern(11, size)), size);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(4);
        Reader reader(pool, engine, 2, kBlock);
        const auto job = reader.start(spec);
        CHECK(job->board().wait(0, kLong));
        job->cancel();
        CHECK(job->join(kLong));
        const std::uint64_t read = job->read_bytes();
        const auto again = reader.start(spec);
        CHECK(ended_as(*again, State::done) && job->read_bytes() == read);
        CHECK(job->board().state() == State::cancelled || read == size);
    }
}

TEST(a_reader_closed_in_mid_load_cancels_and_waits) {
    files::Directory directory;
    const std::uint64_t size = 4 * kChunkBytes;
    const LoadSpec spec = whole_file(directory.write(files::pattern(12, size)), size);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(4);
        auto reader = std::make_unique<Reader>(pool, engine, 4, kBlock);
        const auto job = reader->start(spec);
        CHECK(job->board().wait(0, kLong));
        reader->close();
        CHECK(job->join(0));  // nothing is in flight any more
        CHECK_THROWS(std::logic_error, reader->start(spec));
        reader->close();
        reader.reset();
        CHECK(job->ended());
        const Reader unused(pool, engine, 4, kBlock);
    }
}

TEST(the_eventfd_tells_of_every_step_to_the_end) {
    files::Directory directory;
    const std::uint64_t size = 2 * kChunkBytes;
    const LoadSpec spec = whole_file(directory.write(files::pattern(13, size)), size);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(2);
        Reader reader(pool, engine, 2, kBlock);
        const auto job = reader.start(spec);
        while (!job->join(0)) {
            pollfd waiting{.fd = job->event_fd(), .events = POLLIN, .revents = 0};
            const int woken = ::poll(&waiting, 1, static_cast<int>(kLong * 1000));
            CHECK(woken == 1);
            if (woken != 1) break;
            std::uint64_t count;
            CHECK(::read(job->event_fd(), &count, sizeof count) == sizeof count);
        }
        CHECK(job->board().state() == State::done);
    }
}

TEST(what_is_out_of_range_is_refused) {
    files::Directory directory;
    const std::string path = directory.write(files::pattern(1, 4096));
    const auto pool = pool_of(2);
    CHECK_THROWS(std::invalid_argument, Reader(pool, "aio", 1, kBlock));
    CHECK_THROWS(std::invalid_argument, Reader(pool, "threads", 0, kBlock));
    CHECK_THROWS(std::invalid_argument, Reader(pool, "threads", Reader::kDepthMax + 1, kBlock));
    for (const std::uint32_t block_bytes : {0U, 100U, 4097U, static_cast<std::uint32_t>(2 * kChunkBytes)}) {
        CHECK_THROWS(std::invalid_argument, Reader(pool, "threads", 1, block_bytes));
    }
    Reader reader(pool, "threads", 1, kBlock);
    LoadSpec spec = whole_file(path, 4096);
    spec.table = {2};  // the pool has two
    CHECK_THROWS(std::invalid_argument, reader.start(spec));
    add_file(spec, path, 4096);
    spec.table = {1, 1};
    CHECK_THROWS(std::invalid_argument, reader.start(spec));
    spec.window = 2;
    CHECK_THROWS(std::invalid_argument, reader.start(spec));
    spec.window = 1;
    CHECK(reader.start(spec)->board().window() == 1);
}

TEST(loads_at_once_are_bounded) {
    files::Directory directory;
    const std::string path = directory.write(files::pattern(1, 4096));
    const auto pool = pool_of(1);
    Reader reader(pool, "threads", 1, kBlock);
    LoadSpec spec = whole_file(path, 4096);
    spec.hold = true;
    std::vector<std::shared_ptr<Job>> jobs;
    for (std::size_t i = 0; i < Reader::kLoadsMax; ++i) jobs.push_back(reader.start(spec));
    CHECK_THROWS(std::invalid_argument, reader.start(spec));
    jobs.back()->cancel();
    CHECK(reader.start(spec) != nullptr);
}

// Random loads, windows, priorities, cancels: nothing hangs, and what is ready is right.
TEST(whatever_happens_at_once_every_load_ends_and_ready_bytes_are_right) {
    files::Directory directory;
    const std::uint64_t size = 2 * kChunkBytes + 4321;
    const auto bytes = files::pattern(14, size);
    const std::string path = directory.write(bytes);
    for (const std::string& engine : engines()) {
        const auto pool = pool_of(12);
        Reader reader(pool, engine, 3, kBlock);
        std::vector<std::thread> callers;
        for (std::uint32_t caller = 0; caller < 4; ++caller) {
            callers.emplace_back([&, caller] {
                for (std::uint32_t round = 0; round < 6; ++round) {
                    LoadSpec spec = whole_file(path, size);
                    place(spec, caller * 3, (caller + round) % 3).priority = static_cast<int>(round % 2);
                    const auto job = reader.start(spec);
                    const std::uint32_t stop = (caller * 7 + round * 5) % 5;  // 3 and 4: never
                    for (std::uint32_t position = 0; position < 3; ++position) {
                        if (position == stop) job->cancel();
                        if (!job->board().wait(position, kLong)) break;
                        CHECK(holds(*pool, spec.table[position], spec.extents[position], bytes));
                        job->board().release(position + 1);
                    }
                    CHECK(job->join(kLong));
                    const State state = job->board().state();
                    CHECK(state == State::done || (state == State::cancelled && stop < 3));
                }
            });
        }
        for (std::thread& caller : callers) caller.join();
    }
}
