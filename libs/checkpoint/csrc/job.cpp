#include "job.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "chunk.hpp"

namespace stoker {

namespace {

Fd create_event() {
    Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (fd.get() < 0) throw_errno("eventfd");
    return fd;
}

}  // namespace

Job::Job(std::vector<std::unique_ptr<File>> files, std::vector<Extent> extents, std::shared_ptr<Board> board,
         std::uint32_t block_bytes, bool hold)
    : files_(std::move(files)),
      extents_(std::move(extents)),
      board_(std::move(board)),
      block_bytes_(block_bytes),
      hold_(hold),
      event_(create_event()),
      positions_(board_->positions()),
      pieces_of_file_(files_.size()) {
    check();
    for (const Extent& extent : extents_) {
        const std::uint64_t pieces = (extent.size + block_bytes_ - 1) / block_bytes_;
        positions_[extent.position].pieces += static_cast<std::uint32_t>(pieces);
        pieces_of_file_[extent.file] += pieces;
    }
}

void Job::check() const {
    std::uint32_t next = 0;  // the lowest position that has no extent yet
    for (const Extent& extent : extents_) {
        if (extent.position != next && extent.position + 1 != next) {
            throw std::invalid_argument("extents are not ascending by position, or a position has none");
        }
        next = extent.position + 1;
        if (extent.position >= positions_.size()) throw std::invalid_argument("an extent of no position");
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
    if (next != positions_.size()) throw std::invalid_argument("a position that has no extent");
}

bool Job::window_open() const {
    const std::uint32_t window = board_->window();
    const std::uint32_t position = extents_[extent_].position;
    if (window == 0 || position < window) return true;
    // Published as well: no consumer may release into what is still being read or checked.
    const std::uint32_t before = position - window;
    return before < board_->released() && positions_[before].reading == Reading::published;
}

std::optional<Piece> Job::take() {
    const std::lock_guard guard(mutex_);
    if (ended() || extent_ == extents_.size() || !window_open()) return std::nullopt;
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
    return piece;
}

bool Job::due() const {
    const std::lock_guard guard(mutex_);
    return !ended() && extent_ < extents_.size() && window_open();
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
    if (last_of_file) {
        // The position of this piece is still pending: it becomes ready only if the whole file was read unchanged.
        auto failure = file(piece).check();
        file(piece).close();
        if (failure) {
            failure->file = piece.file;
            fail(*failure);
        }
    }
    const std::lock_guard guard(mutex_);
    if (--positions_[piece.position].pieces == 0 && !ended()) {
        if (hold_) {
            positions_[piece.position].reading = Reading::waiting;
            read_.push_back(piece.position);
            changed_.notify_all();
            signal();
        } else {
            make_ready(piece.position);
        }
    }
    put_back();
}

void Job::abandon(const Piece&) {
    const std::lock_guard guard(mutex_);
    put_back();
}

void Job::put_back() {
    if (--in_flight_ == 0 && ended()) settle();
}

void Job::make_ready(std::uint32_t position) {
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
    changed_.wait_until(lock, deadline_after(timeout_s), [this] { return !read_.empty() || ended(); });
    if (read_.empty() || ended()) return std::nullopt;
    const std::uint32_t position = read_.front();
    read_.pop_front();
    return position;
}

void Job::publish(std::uint32_t position) {
    const std::lock_guard guard(mutex_);
    if (position >= positions_.size()) throw std::invalid_argument("no such position");
    if (ended()) return;
    if (positions_[position].reading != Reading::waiting) {
        throw std::invalid_argument("the position does not wait to be published");
    }
    make_ready(position);
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

bool Read::end_with(Failure failure) {
    failure.file = piece_.file;
    job_->fail(failure);
    job_->abandon(piece_);
    return false;
}

}  // namespace stoker
