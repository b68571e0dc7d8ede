#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"
#include "files.hpp"
#include "memory.hpp"
#include "uring.hpp"

using namespace stoker;

namespace {

io_uring_sqe& prepare(Ring& ring, int fd, void* target, std::uint32_t size, std::uint64_t offset, std::uint64_t tag) {
    io_uring_sqe& entry = ring.next();
    entry.opcode = IORING_OP_READ;
    entry.fd = fd;
    entry.addr = reinterpret_cast<std::uint64_t>(target);
    entry.len = size;
    entry.off = offset;
    entry.user_data = tag;
    return entry;
}

io_uring_cqe wait(Ring& ring) {
    io_uring_cqe completion{};
    while (!ring.pop(completion)) ring.submit_and_wait();
    return completion;
}

}  // namespace

TEST(the_reason_why_there_is_no_ring_is_the_one_that_making_one_gives) {
    int error = 0;
    try {
        Ring ring(4);
    } catch (const std::system_error& refused) {
        error = refused.code().value();
    }
    CHECK(error == io_uring_errno());
}

TEST(a_ring_reads_files_and_goes_round_many_times) {
    if (io_uring_errno() != 0) SKIP("no io_uring");
    files::Directory directory;
    const std::vector<std::byte> bytes = files::pattern(1, 64 * 1024);
    const Fd fd(::open(directory.write(bytes).c_str(), O_RDONLY | O_CLOEXEC));
    Ring ring(4);
    ring.enable();
    std::vector<std::byte> read(bytes.size());
    std::uint32_t next = 0;
    std::uint32_t in_flight = 0;
    for (std::uint32_t completed = 0; completed < 64; ++completed) {
        for (; next < 64 && in_flight < 4; ++next, ++in_flight) {
            prepare(ring, fd.get(), read.data() + next * 1024, 1024, next * 1024, next);
        }
        const io_uring_cqe completion = wait(ring);
        CHECK(completion.res == 1024 && completion.user_data < 64);
        --in_flight;
    }
    CHECK(read == bytes);
}

TEST(a_ring_gives_the_kernels_errors) {
    if (io_uring_errno() != 0) SKIP("no io_uring");
    Ring ring(2);
    ring.enable();
    std::byte target{};
    prepare(ring, -1, &target, 1, 0, 77);
    const io_uring_cqe completion = wait(ring);
    CHECK(completion.res == -EBADF && completion.user_data == 77);
}

TEST(a_ring_belongs_to_the_thread_that_enables_it) {
    if (io_uring_errno() != 0) SKIP("no io_uring");
    files::Directory directory;
    const std::vector<std::byte> bytes = files::pattern(1, 4096);
    const Fd fd(::open(directory.write(bytes).c_str(), O_RDONLY | O_CLOEXEC));
    Ring ring(2);
    std::byte target{};
    std::thread([&] {
        ring.enable();
        prepare(ring, fd.get(), &target, 1, 5, 0);
        CHECK(wait(ring).res == 1 && target == bytes[5]);
    }).join();
}

TEST(a_ring_reads_into_registered_buffers_and_says_if_it_cannot) {
    if (io_uring_errno() != 0) SKIP("no io_uring");
    files::Directory directory;
    const std::vector<std::byte> bytes = files::pattern(2, 4096);
    const Fd fd(::open(directory.write(bytes).c_str(), O_RDONLY | O_CLOEXEC));
    Ring ring(2);
    if (ring.register_buffers(3) != 0) SKIP("no table of empty slots");
    ring.enable();
    std::vector<std::byte> target(4096);
    CHECK(ring.register_buffer(3, target.data(), target.size()) == EINVAL);  // slots are 0, 1, 2
    const int error = ring.register_buffer(2, target.data(), target.size());
    if (error == ENOMEM) SKIP("RLIMIT_MEMLOCK");
    CHECK(error == 0);
    for (const std::uint16_t slot : {std::uint16_t{2}, std::uint16_t{1}}) {
        io_uring_sqe& entry = prepare(ring, fd.get(), target.data() + 100, 1000, 7, slot);
        entry.opcode = IORING_OP_READ_FIXED;
        entry.buf_index = slot;
        CHECK(wait(ring).res == (slot == 2 ? 1000 : -EFAULT));  // nothing is in slot 1
    }
    CHECK(std::equal(target.begin() + 100, target.begin() + 1100, bytes.begin() + 7));
}
