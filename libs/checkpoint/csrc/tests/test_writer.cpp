#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "files.hpp"
#include "writer.hpp"

using namespace stoker;

namespace {

constexpr std::size_t kPiece = 100'000;

/// What each ticket came to, once `count` are done.
std::map<std::uint64_t, std::int64_t> results(Writer& writer, std::size_t count) {
    std::map<std::uint64_t, std::int64_t> found;
    while (found.size() < count) {
        pollfd waiting{.fd = writer.event_fd(), .events = POLLIN, .revents = 0};
        CHECK(::poll(&waiting, 1, 10'000) == 1);
        for (const Writer::Done& done : writer.take_done()) CHECK(found.emplace(done.ticket, done.result).second);
    }
    return found;
}

std::vector<std::byte> contents(const std::string& path, std::size_t size) {
    std::vector<std::byte> bytes(size + 1);
    const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const ssize_t count = ::pread(fd.get(), bytes.data(), bytes.size(), 0);
    bytes.resize(count < 0 ? 0 : static_cast<std::size_t>(count));
    return bytes;
}

}  // namespace

TEST(what_many_threads_write_is_all_there_and_every_ticket_is_told_once) {
    files::Directory directory;
    const std::string path = directory.write({});
    const Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    const std::vector<std::byte> bytes = files::pattern(7, 64 * kPiece);
    Writer writer(4);
    std::vector<std::thread> askers;
    for (std::size_t asker = 0; asker < 4; ++asker) {
        askers.emplace_back([&, asker] {
            for (std::size_t piece = asker; piece < 64; piece += 4) {
                writer.write(fd.get(), bytes.data() + piece * kPiece, kPiece, piece * kPiece);
            }
        });
    }
    for (std::thread& asker : askers) asker.join();
    for (const auto& [ticket, result] : results(writer, 64)) CHECK(result == static_cast<std::int64_t>(kPiece));
    const std::uint64_t synced = writer.sync(fd.get());
    CHECK(results(writer, 1).at(synced) == 0);
    CHECK(contents(path, bytes.size()) == bytes);
}

TEST(a_call_that_fails_gives_its_errno_and_the_next_ones_go_on) {
    files::Directory directory;
    const std::string path = directory.write({});
    const Fd reading(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    const Fd writing(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    const std::vector<std::byte> bytes = files::pattern(1, 100);
    Writer writer(1);
    const std::uint64_t refused = writer.write(reading.get(), bytes.data(), bytes.size(), 0);
    const std::uint64_t unsynced = writer.sync(-1);
    const std::uint64_t written = writer.write(writing.get(), bytes.data(), bytes.size(), 0);
    auto found = results(writer, 3);
    CHECK(found[refused] == -EBADF);
    CHECK(found[unsynced] == -EBADF);
    CHECK(found[written] == 100);
}

TEST(files_are_opened_and_renamed_and_what_is_missing_is_an_errno) {
    files::Directory directory;
    const std::string path = directory.write(files::pattern(5, 100));
    Writer writer(2);
    const std::uint64_t opened = writer.open(path, O_RDONLY, 0600);
    const std::uint64_t missing = writer.open(path + "-missing", O_RDONLY, 0600);
    auto found = results(writer, 2);
    const Fd fd(static_cast<int>(found[opened]));
    CHECK((::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
    CHECK(found[missing] == -ENOENT);

    const std::uint64_t renamed = writer.rename(path, path + "-new");
    CHECK(results(writer, 1).at(renamed) == 0);
    CHECK(contents(path + "-new", 100) == files::pattern(5, 100));
    const std::uint64_t gone = writer.rename(path, path + "-newer");
    CHECK(results(writer, 1).at(gone) == -ENOENT);
    const std::uint64_t back = writer.rename(path + "-new", path);
    CHECK(results(writer, 1).at(back) == 0);
}

TEST(closing_does_what_is_queued_first_and_nothing_after) {
    files::Directory directory;
    const std::string path = directory.write({});
    const Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    const std::vector<std::byte> bytes = files::pattern(3, 100 * kPiece);
    Writer writer(2);
    for (std::size_t piece = 0; piece < 100; ++piece) {
        writer.write(fd.get(), bytes.data() + piece * kPiece, kPiece, piece * kPiece);
    }
    writer.close();
    writer.close();
    CHECK(writer.take_done().size() == 100);
    CHECK(contents(path, bytes.size()) == bytes);
    CHECK_THROWS(std::logic_error, writer.sync(fd.get()));
}

TEST(there_is_a_bound_on_threads_and_on_what_waits_and_nothing_is_not_written) {
    CHECK_THROWS(std::invalid_argument, Writer(0));
    CHECK_THROWS(std::invalid_argument, Writer(Writer::kThreadsMax + 1));
    Writer writer(1);
    const std::byte byte{};
    CHECK_THROWS(std::invalid_argument, writer.write(1, &byte, 0, 0));
    CHECK_THROWS(std::invalid_argument, writer.write(1, nullptr, 1, 0));
    int ends[2];
    CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    const Fd out(ends[0]);
    const Fd in(ends[1]);
    bool refused = false;
    for (std::size_t waiting = 0; waiting < 2 * Writer::kQueuedMax && !refused; ++waiting) {
        try {
            writer.sync(out.get());
            if (waiting < Writer::kQueuedMax) continue;
            ::usleep(10);
        } catch (const std::invalid_argument&) {
            CHECK(waiting >= Writer::kQueuedMax);
            refused = true;
        }
    }
}

TEST(a_destroyed_writer_leaves_no_thread_and_no_descriptor) {
    const std::size_t before = files::open_descriptors();
    { Writer writer(8); }
    CHECK(files::open_descriptors() == before);
}
