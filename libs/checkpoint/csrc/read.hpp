// One piece of a load on its way from its file into a chunk.
#pragma once

#include <cstdint>
#include <memory>

#include "job.hpp"
#include "transfer.hpp"

namespace stoker {

/// One piece on its way: what an engine does around the system call.
class Read {
   public:
    Read(std::shared_ptr<Job> job, const Piece& piece);

    /// Opens the file if need be. False: the load is over, and so is this read.
    bool begin();

    /// result: bytes read, or -errno, of what fd(), offset() and size() say.  True: ask again; they may have changed.
    bool on_result(std::int64_t result);

    int fd() const { return file_->fd(); }
    std::uint64_t offset() const { return transfer_.offset(); }
    std::uint32_t size() const { return transfer_.remaining(); }
    std::uint32_t chunk() const { return piece_.chunk; }

   private:
    bool end_with(const Failure& failure);

    std::shared_ptr<Job> job_;
    File* file_;
    Piece piece_;
    Transfer transfer_;
    bool direct_ = false;  // how it was last asked for
};

}  // namespace stoker
