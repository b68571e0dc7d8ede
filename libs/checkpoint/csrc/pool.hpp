// One memfd cut into chunks, which threads of the lowest priority make fast: faulted, on huge pages, locked.
//
// Cold -> (faulting) -> warm, once, in the order of their indices. Allocation is apart from that: a chunk may be handed
// out while it is cold. Whoever reads into it faults it then, and the fault threads come by later without harm.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string_view>
#include <thread>
#include <vector>

#include "chunk.hpp"
#include "memory.hpp"

namespace stoker {

enum class Huge {
    automatic,  // hugetlb if enough pages are reserved, else collapse
    hugetlb,    // or fail
    collapse,   // MADV_COLLAPSE; small pages where the kernel refuses
    none,
};

struct PoolOptions {
    Huge huge = Huge::automatic;  // an adopted pool keeps what it has; only collapse or none matter to it
    bool lock = true;
    unsigned fault_threads = 2;  // 0: none ever becomes warm; reads fault what they write to
};

/// Thread safe.
class Pool : public std::enable_shared_from_this<Pool> {
   public:
    /// Throws std::invalid_argument for 0 chunks or more than 64 threads, std::system_error if memory is refused.
    static std::shared_ptr<Pool> create(std::uint32_t chunks, const PoolOptions& options);

    /// Take over the pool behind `fd`, which stays the caller's; `used` chunks stay allocated.
    ///
    /// Throws std::invalid_argument if `fd` is no pool or read-only, or `used` is out of range or repeats itself.
    static std::shared_ptr<Pool> adopt(int fd, std::span<const std::uint32_t> used, const PoolOptions& options);

    ~Pool();

    /// Ends the fault threads, within one step of 2 MiB. The memory and the chunks stay. Idempotent.
    void close();

    int fd() const { return fd_.get(); }

    /// A new read-only descriptor, close-on-exec.
    Fd reader_fd() const;

    std::byte* base() const { return memory_.address(); }
    std::byte* chunk_address(std::uint32_t chunk) const { return base() + chunk * kChunkBytes; }
    std::uint32_t chunks() const { return static_cast<std::uint32_t>(chunks_.size()); }

    /// Warm chunks first, then those that have memory, cold ones, and those being faulted; by index within each.
    /// None, and nothing is taken, if fewer than `count` are free.
    std::optional<std::vector<std::uint32_t>> allocate(std::uint32_t count);

    /// Throws std::invalid_argument, and frees none, if a chunk is out of range, repeated or not allocated.
    void free(std::span<const std::uint32_t> chunks);

    std::uint32_t chunks_free() const;

    /// Chunks whose memory is there.
    std::uint32_t chunks_warm() const;
    std::uint32_t chunks_huge() const;
    std::uint32_t chunks_locked() const;

    /// The fault threads are through with this chunk. Only now may its pages be pinned for long (registered buffers,
    /// CUDA): pinned pages cannot be collapsed.
    bool is_warm(std::uint32_t chunk) const;

    /// True once all chunks are warm; False after the timeout, or when no thread works on it any more.
    bool wait_warm(double timeout_s) const;

    /// hugetlb | collapsed | small. `collapsed` only while no collapse has been refused.
    std::string_view pages() const;

    /// Errno of the first refusal, else 0: of memory, of huge pages, of locking.
    int fault_errno() const;
    int collapse_errno() const;
    int lock_errno() const;

    using OnWarm = std::function<void(std::byte* address, std::size_t size)>;

    /// Called once for each chunk: for warm ones now, for others by a fault thread once they are. May not throw.
    /// Destroyed before the memory is unmapped, so what it owns can undo its work in a destructor. Set it once.
    void set_on_warm(OnWarm on_warm);

   private:
    enum class Warmth : std::uint8_t {
        cold,
        backed,  // adopted with its memory; the fault threads have still to come
        faulting,
        warm,
    };
    struct Chunk {
        Warmth warmth = Warmth::cold;
        bool allocated = false;
        bool huge = false;
        bool locked = false;
    };

    Pool(Fd fd, Mapping memory, bool hugetlb, const PoolOptions& options);
    void start(unsigned fault_threads);
    void run_fault_thread(const std::stop_token& stop);
    bool warm(std::uint32_t chunk, const std::stop_token& stop);
    bool collapse(std::byte* step);
    bool lock(std::byte* address);
    template <typename Predicate>
    std::uint32_t count(Predicate predicate) const;

    const Fd fd_;
    const Mapping memory_;
    const bool hugetlb_;

    mutable std::mutex mutex_;  // guards all below but the threads
    mutable std::condition_variable changed_;
    std::vector<Chunk> chunks_;
    OnWarm on_warm_;
    std::uint32_t next_ = 0;  // the next chunk for a fault thread
    unsigned running_ = 0;    // fault threads
    bool collapse_;           // worth trying
    bool lock_;
    int fault_errno_ = 0;
    int collapse_errno_ = 0;
    int lock_errno_ = 0;

    std::stop_source stop_;
    std::mutex threads_mutex_;
    std::vector<std::thread> threads_;
};

}  // namespace stoker
