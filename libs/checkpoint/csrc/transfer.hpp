// One read of a file until all of its bytes are there: what the kernel answered, and so what to ask next. No I/O.
#pragma once

#include <cstdint>

namespace stoker {

class Transfer {
   public:
    enum class Step {
        done,       // every byte is there
        more,       // read remaining() bytes at offset()
        buffered,   // the file system refuses O_DIRECT: the same again without it
        truncated,  // the file ends at offset(), too early
        failed,     // with error(), at offset()
    };

    /// Answers in a row without progress, interruptions included, before a read counts as failed.
    static constexpr std::uint32_t kFruitlessMax = 64;

    /// Wants [offset, offset + size) of a file of file_bytes; it may pass the end of the file.
    Transfer(std::uint64_t offset, std::uint32_t size, std::uint64_t file_bytes);

    /// result: bytes read, or -errno, of a read of remaining() bytes at offset().  direct: it was made with O_DIRECT.
    Step on_result(std::int64_t result, bool direct);

    std::uint64_t offset() const { return offset_; }
    std::uint32_t remaining() const { return static_cast<std::uint32_t>(asked_end_ - offset_); }
    int error() const { return error_; }

   private:
    std::uint64_t offset_;
    std::uint64_t asked_end_;    // a read that passes the file's end keeps its aligned size
    std::uint64_t wanted_end_;   // but no byte past the end is waited for
    std::uint64_t odd_end_ = 0;  // where the last O_DIRECT read stopped, if that is not aligned
    std::uint32_t fruitless_ = 0;
    int error_ = 0;
};

}  // namespace stoker
