// The raw device: what a loader is measured against.
#pragma once

#include <cstdint>
#include <string>

namespace stoker {

/// Seconds to read `size_bytes` of the file once: O_DIRECT, one block after the other, into one buffer.
///
/// Throws std::invalid_argument for a block size that is no multiple of kAlignBytes, std::system_error if the file
/// cannot be read so (EINVAL: no O_DIRECT; EIO: it is shorter).
double sequential_read(const std::string& path, std::uint64_t size_bytes, std::uint32_t block_bytes);

}  // namespace stoker
