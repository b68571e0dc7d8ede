#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "check.hpp"
#include "pool.hpp"
#include "refuse.hpp"
#include "view.hpp"

using namespace stoker;

namespace {

using Chunks = std::vector<std::uint32_t>;

/// Chunk c is full of bytes 10 + c.
std::shared_ptr<Pool> filled_pool(std::uint32_t chunks) {
    auto pool = Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 0});
    for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
        std::fill_n(pool->chunk_address(chunk), kChunkBytes, static_cast<std::byte>(10 + chunk));
    }
    return pool;
}

/// kB that are mapped by whole huge pages in the mappings that begin in [address, address + size).
std::size_t huge_kb(const std::byte* address, std::size_t size) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    std::ifstream smaps("/proc/self/smaps");
    std::size_t total = 0;
    bool inside = false;
    for (std::string line; std::getline(smaps, line);) {
        std::istringstream words(line);
        std::string first;
        words >> first;
        if (first.back() != ':') {  // "7f00-7fff rw-p ...", not "Rss: 4 kB"
            const std::uintptr_t start = std::stoull(first, nullptr, 16);
            inside = begin <= start && start < begin + size;
        } else if (inside && (first == "ShmemPmdMapped:" || first == "FilePmdMapped:")) {
            std::size_t kb = 0;
            words >> kb;
            total += kb;
        }
    }
    return total;
}

}  // namespace

TEST(a_view_shows_its_chunks_side_by_side) {
    const auto pool = filled_pool(4);
    const Fd reader = pool->reader_fd();
    const Chunks table{2, 3, 0, 0, 1, 3, 2};
    const View view(reader.get(), table);
    CHECK(view.size() == table.size() * kChunkBytes);
    CHECK(reinterpret_cast<std::uintptr_t>(view.data()) % kHugeBytes == 0);
    for (std::size_t i = 0; i < table.size(); ++i) {
        const auto* const chunk = view.data() + i * kChunkBytes;
        const auto byte = static_cast<std::byte>(10 + table[i]);
        CHECK(chunk[0] == byte && chunk[kChunkBytes - 1] == byte);
    }
}

TEST(what_a_consumer_writes_never_reaches_the_pool) {
    const auto pool = filled_pool(1);
    const Fd reader = pool->reader_fd();
    const View view(reader.get(), Chunks{0});
    const View other(reader.get(), Chunks{0});
    std::fill_n(view.data(), kAlignBytes, std::byte{99});
    CHECK(view.data()[0] == std::byte{99});
    CHECK(pool->base()[0] == std::byte{10} && other.data()[0] == std::byte{10});
}

TEST(privatised_pages_stay_whatever_the_pool_does) {
    const auto pool = filled_pool(1);
    const View view(pool->fd(), Chunks{0});
    view.privatise(kAlignBytes + 100, kAlignBytes);  // lies on two pages
    view.privatise(0, 0);
    std::fill_n(pool->base(), 4 * kAlignBytes, std::byte{77});
    CHECK(view.data()[0] == std::byte{77});
    CHECK(view.data()[kAlignBytes] == std::byte{10});
    CHECK(view.data()[3 * kAlignBytes - 1] == std::byte{10});
    CHECK(view.data()[3 * kAlignBytes] == std::byte{77});
}

TEST(pages_that_cannot_be_privatised_are_an_error) {
    CHECK(check::status_of_child([] {
              const auto pool = filled_pool(1);
              const View view(pool->fd(), Chunks{0});
              refuse_advice(23 /* MADV_POPULATE_WRITE */, ENOMEM);
              CHECK_THROWS(std::system_error, view.privatise(0, kAlignBytes));
          }) == 0);
}

TEST(a_view_outlives_the_pool_and_its_descriptors) {
    auto pool = filled_pool(2);
    auto view = [&] {
        const Fd reader = pool->reader_fd();
        return View(reader.get(), Chunks{1, 0});
    }();
    pool.reset();
    CHECK(view.data()[0] == std::byte{11} && view.data()[2 * kChunkBytes - 1] == std::byte{10});
}

TEST(touching_reads_a_byte_of_every_page) {
    const auto pool = filled_pool(2);
    const View view(pool->fd(), Chunks{0, 1});
    constexpr std::uint64_t pages = kChunkBytes / kAlignBytes;
    CHECK(view.touch(0, view.size()) == pages * (10 + 11));
    CHECK(view.touch(kAlignBytes - 1, 2) == 20);  // two pages, a byte of each
    CHECK(view.touch(kAlignBytes, kAlignBytes) == 10);
    CHECK(view.touch(view.size(), 0) == 0);
}

TEST(ranges_outside_of_a_view_are_refused) {
    const auto pool = filled_pool(1);
    const View view(pool->fd(), Chunks{0});
    for (const auto& [offset, size] : {std::pair{std::size_t{1}, kChunkBytes},
                                       {kChunkBytes + 1, std::size_t{0}},
                                       {kAlignBytes, SIZE_MAX},
                                       {SIZE_MAX, std::size_t{1}}}) {
        CHECK_THROWS(std::invalid_argument, view.touch(offset, size));
        CHECK_THROWS(std::invalid_argument, (view.privatise(offset, size), 0));
    }
}

TEST(views_of_nothing_or_of_what_is_not_there_are_refused) {
    const auto pool = filled_pool(2);
    CHECK_THROWS(std::invalid_argument, View(pool->fd(), Chunks{}));
    CHECK_THROWS(std::invalid_argument, View(pool->fd(), (Chunks{0, 2})));
    CHECK_THROWS(std::invalid_argument, View(pool->fd(), Chunks{UINT32_MAX}));
    const Fd unsealed(::memfd_create("unsealed", MFD_CLOEXEC));
    CHECK(::ftruncate(unsealed.get(), kChunkBytes) == 0);
    CHECK_THROWS(std::invalid_argument, View(unsealed.get(), Chunks{0}));
    CHECK_THROWS(std::system_error, View(-1, Chunks{0}));
}

TEST(huge_pages_of_the_pool_are_huge_in_the_view) {
    const auto pool = Pool::create(3, {.huge = Huge::collapse, .fault_threads = 2});
    CHECK(pool->wait_warm(60));
    if (pool->chunks_huge() < 3) SKIP("this kernel did not collapse the pool");
    const Fd reader = pool->reader_fd();
    const View view(reader.get(), Chunks{1, 2, 0});
    CHECK(huge_kb(view.data(), view.size()) == 0);
    view.touch(0, view.size());
    CHECK(huge_kb(view.data(), view.size()) == view.size() / 1024);
}

TEST(a_view_of_reserved_huge_pages_works_the_same) {
    std::shared_ptr<Pool> pool;
    try {
        pool = Pool::create(2, {.huge = Huge::hugetlb});
    } catch (const std::system_error&) {
        SKIP("no 16 huge pages are reserved (vm.nr_hugepages)");
    }
    std::fill_n(pool->chunk_address(1), kChunkBytes, std::byte{5});
    const Fd reader = pool->reader_fd();
    const View view(reader.get(), Chunks{1});
    CHECK(view.touch(0, view.size()) == 5 * kChunkBytes / kAlignBytes);
    view.privatise(kAlignBytes, 1);  // takes a huge page that is left over
    pool->chunk_address(1)[kAlignBytes] = std::byte{6};
    CHECK(view.data()[kAlignBytes] == std::byte{5});
}
