// Sizes that the whole loader agrees on.
#pragma once

#include <cstddef>

namespace stoker {

// Of one file, and of the pool.
inline constexpr std::size_t kChunkBytes = std::size_t{16} << 20;

// A huge page: what the addresses of pools and views align to.
inline constexpr std::size_t kHugeBytes = std::size_t{2} << 20;

// A page: what file offsets, sizes and memory of every read align to.
inline constexpr std::size_t kAlignBytes = 4096;

}  // namespace stoker
