#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pool.hpp"
#include "refuse.hpp"

using namespace stoker;

namespace {

using Chunks = std::vector<std::uint32_t>;

constexpr unsigned kPopulate = 23;  // MADV_POPULATE_WRITE
constexpr unsigned kCollapse = 25;  // MADV_COLLAPSE
constexpr double kLong = 60;        // seconds: only a failure takes that long

std::shared_ptr<Pool> cold_pool(std::uint32_t chunks) {
    return Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 0});
}

std::shared_ptr<Pool> warm_pool(std::uint32_t chunks) {
    auto pool = Pool::create(chunks, {.huge = Huge::collapse, .lock = true, .fault_threads = 2});
    CHECK(pool->wait_warm(kLong));
    return pool;
}

std::shared_ptr<Pool> adopted(const Pool& pool, const Chunks& used) {
    return Pool::adopt(pool.fd(), used, {.huge = Huge::none, .lock = false, .fault_threads = 0});
}

}  // namespace

TEST(chunks_lie_one_after_the_other_from_an_aligned_address) {
    const auto pool = cold_pool(3);
    CHECK(reinterpret_cast<std::uintptr_t>(pool->base()) % kHugeBytes == 0);
    CHECK(pool->chunk_address(2) == pool->base() + 2 * kChunkBytes);
    CHECK(pool->chunks() == 3 && pool->chunks_free() == 3);
}

TEST(no_chunk_is_handed_out_twice) {
    const auto pool = cold_pool(4);
    const auto first = pool->allocate(3);
    CHECK(first == (Chunks{0, 1, 2}));
    CHECK(pool->allocate(1) == Chunks{3});
    CHECK(pool->chunks_free() == 0);
}

TEST(an_allocation_that_cannot_be_met_takes_nothing) {
    const auto pool = cold_pool(4);
    CHECK(!pool->allocate(5));
    CHECK(pool->chunks_free() == 4);
    CHECK(pool->allocate(0) == Chunks{});
}

TEST(a_wrong_free_frees_nothing) {
    const auto pool = cold_pool(4);
    pool->allocate(2);
    CHECK_THROWS(std::invalid_argument, pool->free(Chunks{0, 2}));
    CHECK_THROWS(std::invalid_argument, pool->free(Chunks{0, 4}));
    CHECK_THROWS(std::invalid_argument, pool->free(Chunks{0, 1, 0}));
    CHECK(pool->chunks_free() == 2);
    pool->free(Chunks{1, 0});
    CHECK(pool->chunks_free() == 4);
    CHECK_THROWS(std::invalid_argument, pool->free(Chunks{0}));
}

TEST(threads_that_allocate_and_free_never_share_a_chunk) {
    constexpr std::uint32_t chunks = 8;
    const auto pool = Pool::create(chunks, {.huge = Huge::none, .lock = false, .fault_threads = 1});
    std::array<std::atomic<int>, chunks> owners{};
    std::vector<std::jthread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            for (int round = 0; round < 2000; ++round) {
                const auto taken = pool->allocate(3);
                if (!taken) continue;
                for (const auto chunk : *taken) CHECK(owners[chunk].fetch_add(1) == 0);
                for (const auto chunk : *taken) owners[chunk].fetch_sub(1);
                pool->free(*taken);
            }
        });
    }
    threads.clear();
    CHECK(pool->chunks_free() == chunks);
}

TEST(a_pool_without_chunks_or_with_too_many_threads_is_refused) {
    CHECK_THROWS(std::invalid_argument, cold_pool(0));
    CHECK_THROWS(std::invalid_argument, Pool::create(1, {.fault_threads = 65}));
}

TEST(a_pool_larger_than_all_addresses_is_refused_with_an_errno) {
    CHECK_THROWS(std::system_error, cold_pool(UINT32_MAX));
}

TEST(every_chunk_becomes_warm_and_reads_as_zeros) {
    const auto pool = warm_pool(3);
    CHECK(pool->chunks_warm() == 3);
    CHECK(pool->is_warm(0) && pool->is_warm(2));
    CHECK(pool->fault_errno() == 0);
    const auto* const begin = pool->base();
    CHECK(std::all_of(begin, begin + 3 * kChunkBytes, [](std::byte byte) { return byte == std::byte{0}; }));
    if (pool->collapse_errno() == 0) {
        CHECK(pool->pages() == "collapsed" && pool->chunks_huge() == 3);
    } else {
        CHECK(pool->pages() == "small");
    }
    CHECK(pool->chunks_locked() == 3 || pool->lock_errno() != 0);
}

TEST(a_pool_not_asked_for_huge_pages_or_locking_has_neither) {
    const auto pool = Pool::create(1, {.huge = Huge::none, .lock = false, .fault_threads = 1});
    CHECK(pool->wait_warm(kLong));
    CHECK(pool->pages() == "small" && pool->chunks_huge() == 0 && pool->collapse_errno() == 0);
    CHECK(pool->chunks_locked() == 0 && pool->lock_errno() == 0);
}

TEST(what_was_written_before_the_fault_threads_came_stays) {
    const auto first = cold_pool(2);
    std::fill_n(first->base(), 2 * kChunkBytes, std::byte{7});
    const auto pool = Pool::adopt(first->fd(), {}, {.fault_threads = 2});
    CHECK(pool->wait_warm(kLong));
    const auto* const begin = first->base();
    CHECK(std::all_of(begin, begin + 2 * kChunkBytes, [](std::byte byte) { return byte == std::byte{7}; }));
}

TEST(what_is_written_while_the_fault_threads_work_stays) {
    const auto pool = Pool::create(16, {.huge = Huge::collapse, .fault_threads = 2});
    const auto words = reinterpret_cast<std::uint64_t*>(pool->base());
    const std::size_t count = pool->chunks() * kChunkBytes / sizeof(std::uint64_t);
    for (std::size_t i = 0; i < count; ++i) words[i] = i;
    CHECK(pool->wait_warm(kLong));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < count; ++i) wrong += words[i] != i;
    CHECK(wrong == 0);
}

TEST(chunks_with_memory_are_handed_out_first) {
    const auto first = cold_pool(4);
    std::fill_n(first->chunk_address(2), kChunkBytes, std::byte{1});
    std::fill_n(first->chunk_address(1), kChunkBytes - kAlignBytes, std::byte{1});  // a page is missing
    const auto pool = adopted(*first, {});
    CHECK(pool->chunks_warm() == 1);
    CHECK(!pool->is_warm(2));  // it may still be collapsed
    CHECK(pool->allocate(3) == (Chunks{2, 0, 1}));
}

TEST(an_adopted_pool_has_the_same_memory_and_keeps_used_chunks_allocated) {
    auto first = cold_pool(4);
    first->chunk_address(3)[5] = std::byte{42};
    const auto pool = adopted(*first, {3, 1});
    first.reset();
    CHECK(pool->chunk_address(3)[5] == std::byte{42});
    CHECK(pool->allocate(3) == std::nullopt);
    CHECK(pool->allocate(2) == (Chunks{0, 2}));
    pool->free(Chunks{3});
    CHECK(pool->chunks_free() == 1);
}

TEST(what_is_no_pool_is_not_adopted) {
    const auto pool = cold_pool(2);
    CHECK_THROWS(std::invalid_argument, adopted(*pool, {2}));
    CHECK_THROWS(std::invalid_argument, adopted(*pool, {1, 1}));
    const PoolOptions options{.fault_threads = 0};
    const Fd reader = pool->reader_fd();
    CHECK_THROWS(std::invalid_argument, Pool::adopt(reader.get(), {}, options));
    const Fd odd = create_sealed("odd", kChunkBytes + kAlignBytes);
    CHECK_THROWS(std::invalid_argument, Pool::adopt(odd.get(), {}, options));
    const Fd empty = create_sealed("empty", 0);
    CHECK_THROWS(std::invalid_argument, Pool::adopt(empty.get(), {}, options));
    const Fd unsealed(::memfd_create("unsealed", MFD_CLOEXEC));
    CHECK(::ftruncate(unsealed.get(), kChunkBytes) == 0);
    CHECK_THROWS(std::invalid_argument, Pool::adopt(unsealed.get(), {}, options));
    const Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    CHECK_THROWS(std::invalid_argument, Pool::adopt(null.get(), {}, options));
    CHECK_THROWS(std::system_error, Pool::adopt(-1, {}, options));
}

TEST(nobody_can_resize_a_pool) {
    const auto pool = cold_pool(2);
    CHECK(::ftruncate(pool->fd(), kChunkBytes) != 0 && errno == EPERM);
    CHECK(::ftruncate(pool->fd(), 3 * kChunkBytes) != 0 && errno == EPERM);
    CHECK(::fcntl(pool->fd(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0 && errno == EPERM);
}

TEST(a_readers_descriptor_cannot_write) {
    const auto pool = cold_pool(1);
    const Fd reader = pool->reader_fd();
    CHECK(::mmap(nullptr, kChunkBytes, PROT_WRITE, MAP_SHARED, reader.get(), 0) == MAP_FAILED && errno == EACCES);
    CHECK(::fcntl(reader.get(), F_GETFD) == FD_CLOEXEC);
}

TEST(closing_ends_the_fault_threads_and_leaves_the_memory) {
    const auto pool = Pool::create(256, {.fault_threads = 2});  // 4 GiB, of which few are ever faulted
    pool->close();
    pool->close();
    CHECK(pool->chunks_warm() < 256);
    CHECK(!pool->wait_warm(kLong));  // at once: nobody works on it
    CHECK(pool->allocate(1).has_value());
    pool->chunk_address(255)[0] = std::byte{1};
}

TEST(waiting_for_a_warm_pool_ends_with_its_timeout) {
    const auto pool = Pool::create(256, {.fault_threads = 1});
    CHECK(!pool->wait_warm(0));
    CHECK(!pool->wait_warm(-1));
    CHECK(!pool->wait_warm(0.001));
}

TEST(each_chunk_that_becomes_warm_is_told_once) {
    for (const bool before : {true, false}) {
        std::mutex mutex;
        std::multiset<std::byte*> told;
        const auto pool = Pool::create(4, {.fault_threads = 2});
        if (before) CHECK(pool->wait_warm(kLong));
        pool->set_on_warm([&](std::byte* address, std::size_t size) {
            const std::lock_guard guard(mutex);
            CHECK(size == kChunkBytes);
            told.insert(address);
        });
        CHECK(pool->wait_warm(kLong));
        pool->close();
        std::multiset<std::byte*> expected;
        for (std::uint32_t chunk = 0; chunk < 4; ++chunk) expected.insert(pool->chunk_address(chunk));
        CHECK(told == expected);
    }
}

TEST(what_the_warm_hook_owns_goes_while_the_memory_is_there) {
    struct Registered {
        std::byte* memory = nullptr;
        ~Registered() {
            if (memory != nullptr) *memory = std::byte{1};
        }
    };
    auto pool = warm_pool(1);
    pool->set_on_warm([registered = std::make_shared<Registered>()](std::byte* address, std::size_t) {
        registered->memory = address;
    });
    const Fd fd = duplicate(pool->fd());
    pool.reset();
    std::byte byte{};
    CHECK(::pread(fd.get(), &byte, 1, 0) == 1 && byte == std::byte{1});
}

TEST(fault_threads_yield_to_real_work_and_take_no_signals) {
    std::atomic<bool> seen{false};
    const std::thread::id caller = std::this_thread::get_id();
    const auto pool = Pool::create(256, {.huge = Huge::none, .lock = false, .fault_threads = 1});
    pool->set_on_warm([&](std::byte*, std::size_t) {
        if (std::this_thread::get_id() == caller || seen.exchange(true)) return;
        CHECK(::getpriority(PRIO_PROCESS, static_cast<id_t>(::gettid())) == 19);
        sigset_t blocked;
        ::pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
        CHECK(::sigismember(&blocked, SIGINT) == 1 && ::sigismember(&blocked, SIGCHLD) == 1);
        seen.notify_all();
    });
    seen.wait(false);
    sigset_t blocked;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    CHECK(::sigismember(&blocked, SIGINT) == 0);
}

TEST(where_the_kernel_cannot_collapse_chunks_are_warm_on_small_pages) {
    CHECK(check::status_of_child([] {
              refuse_advice(kCollapse, EINVAL);
              const auto pool = warm_pool(2);
              CHECK(pool->collapse_errno() == EINVAL);
              CHECK(pool->pages() == "small" && pool->chunks_huge() == 0 && pool->chunks_warm() == 2);
          }) == 0);
}

TEST(pages_in_use_are_no_refusal_to_collapse) {
    CHECK(check::status_of_child([] {
              refuse_advice(kCollapse, EAGAIN);
              const auto pool = warm_pool(1);
              CHECK(pool->collapse_errno() == 0 && pool->chunks_huge() == 0 && pool->chunks_warm() == 1);
          }) == 0);
}

TEST(without_memory_chunks_stay_cold_and_say_why) {
    CHECK(check::status_of_child([] {
              refuse_advice(kPopulate, ENOMEM);
              const auto pool = Pool::create(3, {.fault_threads = 2});
              CHECK(!pool->wait_warm(kLong));
              CHECK(pool->fault_errno() == ENOMEM && pool->chunks_warm() == 0 && pool->chunks_locked() == 0);
              CHECK(pool->allocate(3).has_value());
          }) == 0);
}

TEST(chunks_are_locked_up_to_the_limit) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    SKIP("sanitizers replace mlock by nothing");
#endif
    CHECK(check::status_of_child([] {
              rlimit limit{};
              ::getrlimit(RLIMIT_MEMLOCK, &limit);
              limit.rlim_max = std::min<rlim_t>(limit.rlim_max, kChunkBytes + kHugeBytes);
              limit.rlim_cur = limit.rlim_max;
              CHECK(::setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
              if (::geteuid() == 0) CHECK(::setuid(65534) == 0);  // root's memory is not limited
              const auto pool = warm_pool(3);
              CHECK(pool->chunks_locked() == limit.rlim_max / kChunkBytes);
              CHECK(pool->lock_errno() == ENOMEM);
          }) == 0);
}

TEST(huge_pages_that_nobody_reserved_are_refused_and_auto_does_without) {
    constexpr std::uint32_t chunks = 4096;  // 64 GiB
    CHECK_THROWS(std::system_error, Pool::create(chunks, {.huge = Huge::hugetlb, .fault_threads = 0}));
    CHECK(Pool::create(chunks, {.huge = Huge::automatic, .fault_threads = 0})->pages() == "collapsed");
}

TEST(a_pool_on_reserved_huge_pages_is_warm_huge_and_locked) {
    std::shared_ptr<Pool> pool;
    try {
        pool = Pool::create(2, {.huge = Huge::hugetlb});
    } catch (const std::system_error&) {
        SKIP("no 16 huge pages are reserved (vm.nr_hugepages)");
    }
    CHECK(pool->wait_warm(kLong));
    CHECK(pool->pages() == "hugetlb" && pool->chunks_huge() == 2 && pool->chunks_locked() == 2);
    pool->chunk_address(1)[0] = std::byte{9};
    const auto heir = Pool::adopt(pool->fd(), Chunks{1}, {});
    CHECK(heir->wait_warm(kLong));
    CHECK(heir->pages() == "hugetlb" && heir->chunk_address(1)[0] == std::byte{9});
}
