#include "job.hpp"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "chunk.hpp"

namespace stoker {

Job::Job(std::vector<std::unique_ptr<File>> files, std::vector<Extent> extents, std::shared_ptr<Board> board,
         std::uint32_t block_bytes, bool hold, bool recover)
    : files_(std::move(files)),
      extents_(std::move(extents)),
      board_(std::move(board)),
      block_bytes_(block_bytes),
      hold_(hold || recover),
      recover_(recover),
      event_(create_event()),
      positions_(board_->positions()),
      pieces_of_file_(files_.size()) {
    check();
    for (const Extent& extent : extents_) {
        const std::uint64_t pieces = pieces_of(extent.size);
        positions_[extent.position].pieces += static_cast<std::uint32_t>(pieces);
        pieces_of_file_[extent.file] += pieces;
    }
    for (Position& position : positions_) {
        if (position.pieces > 0) {
            ++unsettled_;
        } else {
            position.reading = Reading::owned;
        }
    }
}

void Job::check() const {
    std::uint32_t next = 0;  // the lowest position that has no extent yet
    for (const Extent& extent : extents_) {
        if (extent.position >= positions_.size()) throw std::invalid_argument("an extent of no position");
        if (extent.position + 1 < next || (extent.position > next && !recover_)) {
            throw std::invalid_argument("extents are not ascending by position, or a position has none");
        }
        next = extent.position + 1;
        if (extent.file >= files_.size()) throw std::invalid_argument("an extent of no file");
        const std::uint64_t size_bytes = files_[extent.file]->size_bytes();
        if (extent.size == 0 || extent.size % kAlignBytes != 0 || extent.offset % kAlignBytes != 0) {
            throw std::invalid_argument("an extent that is not aligned");
        }
        if (extent.size > kChunkBytes - extent.offset % kChunkBytes) {
            throw std::invalid_argument("an extent that leaves its chunk");
        }
        if (extent.offset >= size_bytes || extent.size >= size_bytes - extent.offset + kAlignBytes) {
            throw std::invalid_argument("an extent that lies past the end of its file");
        }
    }
    if (next != positions_.size() && !recover_) throw std::invalid_argument("a position that has no extent");
}

Job::Position& Job::at(std::uint32_t position) {
    if (position >= positions_.size()) throw std::invalid_argument("no such position");
    return positions_[position];
}

bool Job::window_open(std::uint32_t position) const {
    if (position >= positions_.size()) throw std::invalid_argument("no such position");
    const std::lock_guard guard(mutex_);
    return reusable(position);
}

bool Job::reusable(std::uint32_t position) const {
    const std::uint32_t window = board_->window();
    if (window == 0 || position < window) return true;
    // Published as well: no consumer may release into what is still being read or checked.
    const std::uint32_t before = position - window;
    return before < board_->released() && positions_[before].reading == Reading::published;
}

std::optional<Piece> Job::take() {
    const std::lock_guard guard(mutex_);
    if (ended() || extent_ == extents_.size() || !reusable(extents_[extent_].position)) return std::nullopt;
    const Extent& extent = extents_[extent_];
    const std::uint64_t size = std::min<std::uint64_t>(block_bytes_, extent.size - taken_bytes_);
    const Piece piece{.position = extent.position,
                      .file = extent.file,
                      .chunk = board_->table()[extent.position],
                      .size = static_cast<std::uint32_t>(size),
                      .offset = extent.offset + taken_bytes_};
    taken_bytes_ += size;
    if (taken_bytes_ == extent.size) {
        ++extent_;
        taken_bytes_ = 0;
    }
    ++in_flight_;
    ++positions_[extent.position].in_flight;
    return piece;
}

bool Job::due() const {
    const std::lock_guard guard(mutex_);
    return !ended() && extent_ < extents_.size() && reusable(extents_[extent_].position);
}

bool Job::spent() const {
    const std::lock_guard guard(mutex_);
    return ended() || extent_ == extents_.size();
}

void Job::complete(const Piece& piece) {
    bool last_of_file;
    {
        const std::lock_guard guard(mutex_);
        last_of_file = --pieces_of_file_[piece.file] == 0;
    }
    std::optional<Failure> failure;
    if (last_of_file) {
        // The position of this piece is still pending: it becomes ready only if the whole file was read unchanged.
        failure = file(piece).check();
        file(piece).close();
    }
    const std::lock_guard guard(mutex_);
    Position& position = positions_[piece.position];
    --position.pieces;
    if (failure) {
        failure->file = piece.file;
        lose(piece.position, *failure);
    } else if (position.pieces == 0 && position.reading == Reading::pending && !ended()) {
        if (hold_) {
            position.reading = Reading::waiting;
            read_.push_back(piece.position);
            changed_.notify_all();
            signal();
        } else {
            make_ready(piece.position);
        }
    }
    put_back(piece);
}

void Job::give_up(const Piece& piece, Failure failure) {
    failure.file = piece.file;
    const std::lock_guard guard(mutex_);
    drop_pieces(piece.file, 1);
    lose(piece.position, failure);
    put_back(piece);
}

void Job::abandon(const Piece& piece) {
    const std::lock_guard guard(mutex_);
    put_back(piece);
}

void Job::put_back(const Piece& piece) {
    Position& position = positions_[piece.position];
    --position.in_flight;
    --in_flight_;
    if (ended()) {
        if (in_flight_ == 0) settle();
    } else if (position.reading == Reading::lost && position.in_flight == 0) {
        hand_over(piece.position);
    }
}

/// Takes no more pieces of the position. Its first failure is the one that counts.
void Job::lose(std::uint32_t position, const Failure& failure) {
    if (!recover_) {
        finish(State::failed, failure);
        return;
    }
    if (ended() || positions_[position].reading != Reading::pending) return;
    positions_[position].reading = Reading::lost;
    positions_[position].failure = failure;
    // One of its pieces was taken, and they are taken in order: what is left of it comes next.
    for (; extent_ < extents_.size() && extents_[extent_].position == position; ++extent_, taken_bytes_ = 0) {
        drop_pieces(extents_[extent_].file, pieces_of(extents_[extent_].size - taken_bytes_));
    }
}

/// Nothing writes to the position's chunk any more.
void Job::hand_over(std::uint32_t position) {
    positions_[position].reading = Reading::owned;
    failed_.push_back({.position = position, .failure = positions_[position].failure});
    one_settled();
    signal();
}

/// These will never be complete.
void Job::drop_pieces(std::uint32_t file, std::uint64_t pieces) {
    if ((pieces_of_file_[file] -= pieces) == 0) files_[file]->close();
}

void Job::one_settled() {
    if (--unsettled_ == 0) changed_.notify_all();
}

void Job::make_ready(std::uint32_t position) {
    if (positions_[position].reading != Reading::owned) one_settled();
    positions_[position].reading = Reading::published;
    board_->mark_ready(position);
    if (++published_ == positions_.size()) {
        finish(State::done, {});
    } else {
        signal();
    }
}

std::optional<std::uint32_t> Job::next_read(double timeout_s) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline_after(timeout_s),
                        [this] { return !read_.empty() || ended() || unsettled_ == 0; });
    if (read_.empty() || ended()) return std::nullopt;
    const std::uint32_t position = read_.front();
    read_.pop_front();
    return position;
}

void Job::publish(std::uint32_t position) {
    const std::lock_guard guard(mutex_);
    const Reading reading = at(position).reading;
    if (ended()) return;
    if ((reading != Reading::waiting && reading != Reading::owned) || !reusable(position)) {
        throw std::invalid_argument("the position does not wait to be published");
    }
    make_ready(position);
}

void Job::reject(std::uint32_t position, const Failure& failure) {
    const std::lock_guard guard(mutex_);
    Position& rejected = at(position);
    if (ended()) return;
    if (!recover_ || rejected.reading != Reading::waiting) {
        throw std::invalid_argument("the position does not wait to be verified, or its load does not recover");
    }
    rejected.failure = failure;
    hand_over(position);
}

std::optional<Rejected> Job::next_failed() {
    const std::lock_guard guard(mutex_);
    if (failed_.empty() || ended()) return std::nullopt;
    const Rejected rejected = failed_.front();
    failed_.pop_front();
    return rejected;
}

std::uint32_t Job::unsettled() const {
    const std::lock_guard guard(mutex_);
    return ended() ? 0 : unsettled_;
}

void Job::fail(const Failure& failure) {
    const std::lock_guard guard(mutex_);
    finish(State::failed, failure);
}

void Job::cancel() {
    const std::lock_guard guard(mutex_);
    finish(State::cancelled, {});
}

void Job::finish(State state, const Failure& failure) {
    if (board_->finish(state, failure)) settle();
}

void Job::settle() {
    if (in_flight_ == 0) {
        for (const auto& file : files_) file->close();
    }
    changed_.notify_all();
    signal();
}

bool Job::join(double timeout_s) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline_after(timeout_s), [this] { return ended() && in_flight_ == 0; });
}

void Job::signal() {
    const std::uint64_t one = 1;
    // Full only after 2^64 - 1 signals: it is readable then as well.
    [[maybe_unused]] const auto written = ::write(event_.get(), &one, sizeof one);
}

}  // namespace stoker
