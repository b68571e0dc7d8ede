#include "transfer.hpp"

#include <algorithm>
#include <cerrno>

#include "chunk.hpp"

namespace stoker {

Transfer::Transfer(std::uint64_t offset, std::uint32_t size, std::uint64_t file_bytes)
    : offset_(offset), asked_end_(offset + size), wanted_end_(std::min(offset + size, file_bytes)) {}

Transfer::Step Transfer::on_result(std::int64_t result, bool direct) {
    if (result == 0) return Step::truncated;
    if (result > 0) {
        std::uint64_t end = offset_ + static_cast<std::uint64_t>(result);
        if (end >= wanted_end_) {
            offset_ = wanted_end_;
            return Step::done;
        }
        if (direct && end % kAlignBytes != 0) {
            // Only the end of a file stops a read at the same odd byte twice.
            if (end == odd_end_) {
                offset_ = end;
                return Step::truncated;
            }
            odd_end_ = end;
            end -= end % kAlignBytes;  // the next read has to begin aligned: these bytes are read again
        }
        if (end > offset_) {
            offset_ = end;
            fruitless_ = 0;
            return Step::more;
        }
    } else if (result == -EINVAL && direct) {
        return Step::buffered;
    } else if (result != -EINTR && result != -EAGAIN) {
        error_ = static_cast<int>(-result);
        return Step::failed;
    }
    if (++fruitless_ < kFruitlessMax) return Step::more;
    error_ = result < 0 ? static_cast<int>(-result) : EIO;
    return Step::failed;
}

}  // namespace stoker
