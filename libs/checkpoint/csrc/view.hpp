// A consumer's mapping of a pool: chunks side by side at one address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "memory.hpp"

namespace stoker {

/// Private: what is written here goes to copies of the pages and never reaches the pool. (A pool on hugetlb has such
/// copies only while reserved pages are left over; without, a writer gets SIGBUS and privatise() an error.) The memory
/// stays valid as long as the view, whatever becomes of the pool. Aligned to kHugeBytes, so huge pages stay huge.
class View {
   public:
    /// pool_fd: of a pool, read-only is enough; stays the caller's.  table: chunks, which may repeat.
    ///
    /// Throws std::invalid_argument for an empty table, no pool, or a chunk outside of it.
    View(int pool_fd, std::span<const std::uint32_t> table);

    std::byte* data() const { return memory_.address(); }
    std::size_t size() const { return memory_.size(); }

    /// Reads a byte of every page and returns their sum. Throws std::invalid_argument for a range outside of the view.
    std::uint64_t touch(std::size_t offset, std::size_t size) const;

    /// Gives these pages copies of this process's own, which stay as they are whatever the pool does.
    ///
    /// Throws std::invalid_argument for a range outside of the view, std::system_error if there is no memory for them.
    void privatise(std::size_t offset, std::size_t size) const;

   private:
    void check(std::size_t offset, std::size_t size) const;

    Mapping memory_;
};

}  // namespace stoker
