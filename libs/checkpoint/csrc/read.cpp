#include "read.hpp"

#include <utility>

namespace stoker {

Read::Read(std::shared_ptr<Job> job, const Piece& piece)
    : job_(std::move(job)),
      file_(&job_->file(piece)),
      piece_(piece),
      transfer_(piece.offset, piece.size, file_->size_bytes()) {}

bool Read::begin() {
    if (job_->ended()) {
        job_->abandon(piece_);
        return false;
    }
    if (const auto failure = file_->open()) return end_with(*failure);
    direct_ = file_->direct();
    if (!direct_) job_->lose_direct();
    return true;
}

bool Read::on_result(std::int64_t result) {
    if (result > 0) job_->count(static_cast<std::uint64_t>(result));
    switch (transfer_.on_result(result, direct_)) {
        case Transfer::Step::done:
            job_->complete(piece_);
            return false;
        case Transfer::Step::more:
            return begin();
        case Transfer::Step::buffered:
            file_->use_page_cache();
            return begin();
        case Transfer::Step::truncated:
            return end_with({.kind = FailureKind::truncated, .offset = transfer_.offset()});
        case Transfer::Step::failed:
            return end_with(
                {.kind = FailureKind::read_error, .offset = transfer_.offset(), .error = transfer_.error()});
    }
    return false;
}

bool Read::end_with(const Failure& failure) {
    job_->give_up(piece_, failure);
    return false;
}

}  // namespace stoker
