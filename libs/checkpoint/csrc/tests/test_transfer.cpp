#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "chunk.hpp"
#include "transfer.hpp"

using namespace stoker;
using Step = Transfer::Step;

namespace {

constexpr bool kDirect = true;
constexpr bool kBuffered = false;
constexpr std::uint64_t kLarge = std::uint64_t{1} << 40;

}  // namespace

TEST(a_full_answer_is_done) {
    Transfer transfer(8192, 16384, kLarge);
    CHECK(transfer.offset() == 8192 && transfer.remaining() == 16384);
    CHECK(transfer.on_result(16384, kDirect) == Step::done);
}

TEST(a_short_answer_asks_for_the_rest) {
    Transfer transfer(8192, 16384, kLarge);
    CHECK(transfer.on_result(4096, kDirect) == Step::more);
    CHECK(transfer.offset() == 12288 && transfer.remaining() == 12288);
    CHECK(transfer.on_result(12288, kDirect) == Step::done);
}

TEST(after_an_odd_count_a_direct_read_goes_on_aligned_and_a_buffered_one_where_it_stopped) {
    Transfer direct(0, 16384, kLarge);
    CHECK(direct.on_result(5000, kDirect) == Step::more && direct.offset() == 4096 && direct.remaining() == 12288);
    Transfer buffered(0, 16384, kLarge);
    CHECK(buffered.on_result(5000, kBuffered) == Step::more && buffered.offset() == 5000);
    CHECK(buffered.remaining() == 11384);
}

TEST(a_read_that_passes_the_end_is_done_at_the_end_and_not_before) {
    Transfer transfer(4096, 8192, 4096 + 5000);
    CHECK(transfer.on_result(4096, kDirect) == Step::more);
    CHECK(transfer.remaining() == 4096);  // still a whole block
    CHECK(transfer.on_result(904, kDirect) == Step::done);
}

TEST(a_file_that_ends_too_early_is_truncated_there) {
    Transfer aligned(4096, 16384, kLarge);
    CHECK(aligned.on_result(4096, kDirect) == Step::more);
    CHECK(aligned.on_result(0, kDirect) == Step::truncated && aligned.offset() == 8192);
    Transfer odd(4096, 16384, kLarge);
    CHECK(odd.on_result(5000, kDirect) == Step::more);
    CHECK(odd.on_result(904, kDirect) == Step::truncated && odd.offset() == 9096);
    Transfer buffered(0, 8192, kLarge);
    CHECK(buffered.on_result(5000, kBuffered) == Step::more);
    CHECK(buffered.on_result(0, kBuffered) == Step::truncated && buffered.offset() == 5000);
}

TEST(interruptions_are_repeated_but_not_for_ever) {
    for (const int error : {EINTR, EAGAIN}) {
        Transfer transfer(0, 8192, kLarge);
        std::uint32_t repeated = 0;
        while (repeated < 1000 && transfer.on_result(-error, kDirect) == Step::more) ++repeated;
        CHECK(repeated == Transfer::kFruitlessMax - 1 && transfer.error() == error && transfer.offset() == 0);
    }
}

TEST(progress_forgives_interruptions) {
    Transfer transfer(0, 1 << 20, kLarge);
    for (int block = 0; block < 255; ++block) {
        CHECK(transfer.on_result(-EINTR, kDirect) == Step::more);
        CHECK(transfer.on_result(4096, kDirect) == Step::more);
    }
    CHECK(transfer.on_result(4096, kDirect) == Step::done);
}

TEST(crumbs_that_never_make_a_block_fail_in_the_end) {
    Transfer transfer(0, 8192, kLarge);
    std::uint32_t repeated = 0;
    while (repeated < 1000 && transfer.on_result(1 + repeated % 100, kDirect) == Step::more) ++repeated;
    CHECK(repeated == Transfer::kFruitlessMax - 1 && transfer.error() == EIO);
}

TEST(einval_means_buffered_only_to_a_direct_read) {
    Transfer transfer(4096, 8192, kLarge);
    CHECK(transfer.on_result(-EINVAL, kDirect) == Step::buffered);
    CHECK(transfer.offset() == 4096 && transfer.remaining() == 8192);
    CHECK(transfer.on_result(-EINVAL, kBuffered) == Step::failed && transfer.error() == EINVAL);
}

TEST(an_error_says_where) {
    Transfer transfer(0, 16384, kLarge);
    CHECK(transfer.on_result(8192, kDirect) == Step::more);
    CHECK(transfer.on_result(-EIO, kDirect) == Step::failed);
    CHECK(transfer.error() == EIO && transfer.offset() == 8192);
}

// A kernel that answers as it likes: every wanted byte arrives, nothing past the request is touched, O_DIRECT is
// aligned.
TEST(whatever_the_kernel_answers_every_byte_arrives_or_the_truth_is_told) {
    std::mt19937 random(20261121);
    const auto below = [&](std::uint64_t bound) { return std::uint64_t{random()} % bound; };
    int done = 0;
    int truncated = 0;
    for (int round = 0; round < 20'000; ++round) {
        const std::uint64_t registered = 1 + below(40'000);
        const std::uint64_t offset = below((registered + kAlignBytes - 1) / kAlignBytes) * kAlignBytes;
        const std::uint64_t blocks = (registered - offset + kAlignBytes - 1) / kAlignBytes;
        const auto size = static_cast<std::uint32_t>((1 + below(blocks)) * kAlignBytes);
        const std::uint64_t real = below(4) == 0 ? below(registered) : registered;  // the file's true size
        bool direct = below(2) == 0;
        std::vector<char> there(size, 0);
        Transfer transfer(offset, size, registered);
        Step step = Step::more;
        while (step == Step::more || step == Step::buffered) {
            if (step == Step::buffered) direct = false;
            if (direct) CHECK(transfer.offset() % kAlignBytes == 0 && transfer.remaining() % kAlignBytes == 0);
            const std::uint64_t begin = transfer.offset();
            CHECK(begin >= offset && begin + transfer.remaining() <= offset + size);
            std::int64_t result;
            const std::uint64_t dice = below(10);
            if (dice == 0) {
                result = -EINTR;
            } else if (dice == 1 && direct) {
                result = -EINVAL;
            } else {
                std::uint64_t count = begin < real ? std::min<std::uint64_t>(transfer.remaining(), real - begin) : 0;
                // Cut short, but so that only the end of the file is odd twice.
                if (dice < 6 && count > kAlignBytes) count -= below(count / kAlignBytes) * kAlignBytes;
                if (count > 0) std::memset(&there[begin - offset], 1, count);
                result = static_cast<std::int64_t>(count);
            }
            step = transfer.on_result(result, direct);
        }
        const std::uint64_t end = std::min(offset + size, registered);
        if (step == Step::done) {
            ++done;
            CHECK(real >= end);
            CHECK(std::memchr(there.data(), 0, end - offset) == nullptr);
        } else {
            ++truncated;
            CHECK(step == Step::truncated && real < end && transfer.offset() == std::max(real, offset));
        }
    }
    CHECK(done > 1000 && truncated > 1000);
}
