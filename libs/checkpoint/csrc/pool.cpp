#include "pool.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "thread.hpp"

#ifndef MADV_COLLAPSE  // Linux 6.1; glibc names it since 2.37
#define MADV_COLLAPSE 25
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

namespace stoker {

namespace {

constexpr unsigned kMaxFaultThreads = 64;
constexpr int kCollapseTries = 10;  // while reads in flight hold the pages
constexpr std::chrono::milliseconds kCollapsePause{1};

std::size_t pool_bytes(std::uint32_t chunks) { return chunks * kChunkBytes; }

/// The pool's file at an address aligned to kHugeBytes.
Mapping map_pool(int fd, std::size_t size) {
    Mapping memory = reserve(size);
    if (::mmap(memory.address(), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        throw_errno("mmap");
    }
    return memory;
}

/// Calls `found` for each chunk whose memory exists already: for none on hugetlbfs, which cannot tell.
template <typename Found>
void for_backed_chunks(int fd, std::uint32_t chunks, Found found) {
    // Along the data, not chunk by chunk: the kernel looks for a hole page by page, so that would be quadratic.
    const auto size = static_cast<off_t>(pool_bytes(chunks));
    off_t end = 0;
    while (end < size) {
        const off_t begin = ::lseek(fd, end, SEEK_DATA);
        if (begin < 0) return;  // ENXIO: no more data
        end = ::lseek(fd, begin, SEEK_HOLE);
        if (end < 0) return;
        const auto first = (static_cast<std::size_t>(begin) + kChunkBytes - 1) / kChunkBytes;
        for (auto chunk = first; (chunk + 1) * kChunkBytes <= static_cast<std::size_t>(end); ++chunk) found(chunk);
    }
}

}  // namespace

std::shared_ptr<Pool> Pool::create(std::uint32_t chunks, const PoolOptions& options) {
    if (chunks == 0) throw std::invalid_argument("a pool of no chunks");
    const std::size_t size = pool_bytes(chunks);
    const auto make = [&](bool hugetlb) {
        Fd fd = create_sealed("stoker-pool", size, hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0U);
        Mapping memory = map_pool(fd.get(), size);  // of hugetlb, this reserves every page or fails
        std::shared_ptr<Pool> pool(new Pool(std::move(fd), std::move(memory), hugetlb, options));
        pool->start(options.fault_threads);
        return pool;
    };
    if (options.huge == Huge::hugetlb) return make(true);
    if (options.huge == Huge::automatic) {
        try {
            return make(true);
        } catch (const std::system_error&) {  // too few pages are reserved, or none of this size exist
        }
    }
    return make(false);
}

std::shared_ptr<Pool> Pool::adopt(int fd, std::span<const std::uint32_t> used, const PoolOptions& options) {
    const std::size_t size = sealed_size(fd);
    struct statfs filesystem{};
    if (::fstatfs(fd, &filesystem) != 0) throw_errno("fstatfs");
    const bool hugetlb = filesystem.f_type == HUGETLBFS_MAGIC;
    if (size == 0 || size % kChunkBytes != 0) throw std::invalid_argument("not a pool: no whole number of chunks");
    if ((::fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR) throw std::invalid_argument("a pool that cannot be written");

    Fd own = duplicate(fd);
    Mapping memory = map_pool(own.get(), size);
    std::shared_ptr<Pool> pool(new Pool(std::move(own), std::move(memory), hugetlb, options));
    for (const std::uint32_t chunk : used) {
        if (chunk >= pool->chunks()) throw std::invalid_argument("a used chunk outside of the pool");
        if (std::exchange(pool->chunks_[chunk].allocated, true)) {
            throw std::invalid_argument("a used chunk given twice");
        }
    }
    if (!hugetlb) {
        for_backed_chunks(pool->fd(), pool->chunks(),
                          [&](std::size_t chunk) { pool->chunks_[chunk].warmth = Warmth::backed; });
    }
    pool->start(options.fault_threads);
    return pool;
}

Pool::Pool(Fd fd, Mapping memory, bool hugetlb, const PoolOptions& options)
    : fd_(std::move(fd)),
      memory_(std::move(memory)),
      hugetlb_(hugetlb),
      chunks_(memory_.size() / kChunkBytes),
      collapse_(!hugetlb && options.huge != Huge::none),
      lock_(options.lock) {
    if (options.fault_threads > kMaxFaultThreads) throw std::invalid_argument("too many fault threads");
}

Pool::~Pool() { close(); }

void Pool::start(unsigned fault_threads) {
    running_ = fault_threads;
    for (unsigned i = 0; i < fault_threads; ++i) {
        threads_.push_back(start_thread("stoker-fault", [this] { run_fault_thread(stop_.get_token()); }));
    }
}

void Pool::close() {
    const std::lock_guard guard(threads_mutex_);
    stop_.request_stop();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

Fd Pool::reader_fd() const {
    const std::string path = "/proc/self/fd/" + std::to_string(fd());
    Fd reader(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (reader.get() < 0) throw_errno("open(/proc/self/fd)");
    return reader;
}

std::optional<std::vector<std::uint32_t>> Pool::allocate(std::uint32_t count) {
    const std::lock_guard guard(mutex_);
    std::vector<std::uint32_t> taken;
    for (const Warmth warmth : {Warmth::warm, Warmth::backed, Warmth::cold, Warmth::faulting}) {
        for (std::uint32_t chunk = 0; chunk < chunks() && taken.size() < count; ++chunk) {
            if (!chunks_[chunk].allocated && chunks_[chunk].warmth == warmth) taken.push_back(chunk);
        }
    }
    if (taken.size() < count) return std::nullopt;
    for (const std::uint32_t chunk : taken) chunks_[chunk].allocated = true;
    return taken;
}

void Pool::free(std::span<const std::uint32_t> chunks) {
    std::vector<std::uint32_t> sorted(chunks.begin(), chunks.end());
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
        throw std::invalid_argument("a chunk freed twice");
    }
    const std::lock_guard guard(mutex_);
    for (const std::uint32_t chunk : sorted) {
        if (chunk >= this->chunks() || !chunks_[chunk].allocated) {
            throw std::invalid_argument("a chunk that is not allocated");
        }
    }
    for (const std::uint32_t chunk : sorted) chunks_[chunk].allocated = false;
}

template <typename Predicate>
std::uint32_t Pool::count(Predicate predicate) const {
    const std::lock_guard guard(mutex_);
    return static_cast<std::uint32_t>(std::count_if(chunks_.begin(), chunks_.end(), predicate));
}

std::uint32_t Pool::chunks_free() const {
    return count([](const Chunk& chunk) { return !chunk.allocated; });
}

std::uint32_t Pool::chunks_warm() const {
    return count([](const Chunk& chunk) { return chunk.warmth == Warmth::warm || chunk.warmth == Warmth::backed; });
}

std::uint32_t Pool::chunks_huge() const {
    return count([](const Chunk& chunk) { return chunk.huge; });
}

std::uint32_t Pool::chunks_locked() const {
    return count([](const Chunk& chunk) { return chunk.locked; });
}

bool Pool::is_warm(std::uint32_t chunk) const {
    const std::lock_guard guard(mutex_);
    return chunks_.at(chunk).warmth == Warmth::warm;
}

bool Pool::wait_warm(double timeout_s) const {
    const auto all_warm = [this] {
        return std::all_of(chunks_.begin(), chunks_.end(),
                           [](const Chunk& chunk) { return chunk.warmth == Warmth::warm; });
    };
    std::unique_lock guard(mutex_);
    changed_.wait_until(guard, deadline_after(timeout_s), [&] { return running_ == 0 || all_warm(); });
    return all_warm();
}

std::string_view Pool::pages() const {
    if (hugetlb_) return "hugetlb";
    const std::lock_guard guard(mutex_);
    return collapse_ && collapse_errno_ == 0 ? "collapsed" : "small";
}

int Pool::fault_errno() const {
    const std::lock_guard guard(mutex_);
    return fault_errno_;
}

int Pool::collapse_errno() const {
    const std::lock_guard guard(mutex_);
    return collapse_errno_;
}

int Pool::lock_errno() const {
    const std::lock_guard guard(mutex_);
    return lock_errno_;
}

void Pool::set_on_warm(OnWarm on_warm) {
    std::vector<std::uint32_t> already;
    {
        const std::lock_guard guard(mutex_);
        on_warm_ = on_warm;  // from here on the fault threads call it
        for (std::uint32_t chunk = 0; chunk < chunks(); ++chunk) {
            if (chunks_[chunk].warmth == Warmth::warm) already.push_back(chunk);
        }
    }
    for (const std::uint32_t chunk : already) on_warm(chunk_address(chunk), kChunkBytes);
}

void Pool::run_fault_thread(const std::stop_token& stop) {
    // Behind real work, but not SCHED_IDLE: who holds the lock on this process's mappings must get on in the end.
    ::setpriority(PRIO_PROCESS, static_cast<id_t>(::gettid()), 19);

    std::unique_lock guard(mutex_);
    while (next_ < chunks() && !stop.stop_requested()) {
        const std::uint32_t chunk = next_++;
        if (chunks_[chunk].warmth == Warmth::cold) chunks_[chunk].warmth = Warmth::faulting;
        guard.unlock();
        const bool warmed = warm(chunk, stop);
        guard.lock();
        if (warmed) {
            chunks_[chunk].warmth = Warmth::warm;
            const OnWarm on_warm = on_warm_;
            guard.unlock();
            if (on_warm) on_warm(chunk_address(chunk), kChunkBytes);
            guard.lock();
        } else if (chunks_[chunk].warmth == Warmth::faulting) {
            chunks_[chunk].warmth = Warmth::cold;
        }
        changed_.notify_all();
    }
    --running_;
    changed_.notify_all();
}

/// False if it was stopped or the memory cannot be had.
bool Pool::warm(std::uint32_t chunk, const std::stop_token& stop) {
    std::byte* const address = chunk_address(chunk);
    bool huge = true;
    for (std::size_t offset = 0; offset < kChunkBytes; offset += kHugeBytes) {
        if (stop.stop_requested()) return false;
        std::byte* const step = address + offset;
        // Collapsing first makes one clear huge page out of a single small one, many times faster than clearing 512
        // small ones and copying them. Whatever it leaves undone, the populating of the whole step then does.
        int error = hugetlb_ ? 0 : advise(step, kAlignBytes, MADV_POPULATE_WRITE);
        if (error == 0) {
            huge = (hugetlb_ || collapse(step)) && huge;
            error = advise(step, kHugeBytes, MADV_POPULATE_WRITE);
        }
        if (error != 0) {
            const std::lock_guard guard(mutex_);
            if (fault_errno_ == 0) fault_errno_ = error;
            return false;
        }
    }
    const bool locked = lock(address);
    const std::lock_guard guard(mutex_);
    chunks_[chunk].huge = huge;
    chunks_[chunk].locked = locked;
    return true;
}

bool Pool::collapse(std::byte* step) {
    {
        const std::lock_guard guard(mutex_);
        if (!collapse_) return false;
    }
    int error = advise(step, kHugeBytes, MADV_COLLAPSE);
    for (int tries = 1; error == EAGAIN && tries < kCollapseTries; ++tries) {
        std::this_thread::sleep_for(kCollapsePause);
        error = advise(step, kHugeBytes, MADV_COLLAPSE);
    }
    if (error == 0) return true;
    if (error == EAGAIN) return false;  // in use: no refusal
    const std::lock_guard guard(mutex_);
    if (collapse_errno_ == 0) collapse_errno_ = error;
    // No huge page just now, or no room in the cgroup: the next step may do. All else (EINVAL: a kernel that cannot)
    // will not change.
    if (error != ENOMEM && error != EBUSY) collapse_ = false;
    return false;
}

bool Pool::lock(std::byte* address) {
    {
        const std::lock_guard guard(mutex_);
        if (!lock_) return false;
    }
    if (hugetlb_) return true;  // is never swapped out
    if (::mlock(address, kChunkBytes) == 0) return true;
    const int error = errno;
    const std::lock_guard guard(mutex_);
    if (lock_errno_ == 0) lock_errno_ = error;
    lock_ = false;  // the limit is reached, and no chunk is smaller
    return false;
}

}  // namespace stoker
