// One load: which piece to read next, what is complete, how it ends. The engines and the owner of the load meet here.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "board.hpp"
#include "file.hpp"
#include "memory.hpp"
#include "transfer.hpp"

namespace stoker {

/// Bytes of a file that belong to a position. Multiples of kAlignBytes, within one chunk; the end may pass the file's.
struct Extent {
    std::uint32_t position;
    std::uint32_t file;
    std::uint64_t offset;
    std::uint64_t size;
};

/// What is read at once.
struct Piece {
    std::uint32_t position;
    std::uint32_t file;
    std::uint32_t chunk;  // of the pool; the bytes go to offset % kChunkBytes of it
    std::uint32_t size;
    std::uint64_t offset;
};

/// Thread safe.
class Job {
   public:
    /// extents: ascending by position, at least one for each.  hold: positions wait for publish().
    ///
    /// Throws std::invalid_argument for what breaks the rules of Extent and Board.
    Job(std::vector<std::unique_ptr<File>> files, std::vector<Extent> extents, std::shared_ptr<Board> board,
        std::uint32_t block_bytes, bool hold);

    // Engines. Each piece taken is given back once, by complete() or abandon().

    /// The next piece, in file order. None when the window is full, when all are taken, or after the end.
    std::optional<Piece> take();

    /// Whether take() would give a piece if asked now.
    bool due() const;

    /// Nothing will be taken any more.
    bool spent() const;

    File& file(const Piece& piece) { return *files_[piece.file]; }
    void complete(const Piece& piece);
    void abandon(const Piece& piece);
    void count(std::uint64_t bytes) { read_bytes_.fetch_add(bytes, std::memory_order_relaxed); }
    void lose_direct() { direct_.store(false, std::memory_order_relaxed); }

    // The owner.

    Board& board() const { return *board_; }
    const std::shared_ptr<Board>& shared_board() const { return board_; }
    bool direct() const { return direct_.load(std::memory_order_relaxed); }
    std::uint64_t read_bytes() const { return read_bytes_.load(std::memory_order_relaxed); }

    /// An eventfd: readable after a position was read (hold) or became ready, and once join() has something new to say.
    int event_fd() const { return event_.get(); }

    /// A position that waits for publish(); each is given once. None after the timeout or the end.
    std::optional<std::uint32_t> next_read(double timeout_s);

    /// Throws std::invalid_argument for a position that does not wait for it. After the end it does nothing.
    void publish(std::uint32_t position);

    // How a load ends. The first end counts.

    void fail(const Failure& failure);
    void cancel();
    bool ended() const { return board_->state() != State::loading; }

    /// Whether it has ended and no read is in flight: its chunks are not written any more.
    bool join(double timeout_s);

   private:
    enum class Reading : std::uint8_t { pending, waiting, published };
    struct Position {
        std::uint32_t pieces = 0;  // not complete yet
        Reading reading = Reading::pending;
    };

    void check() const;
    bool window_open() const;
    void finish(State state, const Failure& failure);
    void make_ready(std::uint32_t position);
    void put_back();
    void settle();
    void signal();

    const std::vector<std::unique_ptr<File>> files_;
    const std::vector<Extent> extents_;
    const std::shared_ptr<Board> board_;
    const std::uint32_t block_bytes_;
    const bool hold_;
    const Fd event_;

    std::atomic<bool> direct_ = true;
    std::atomic<std::uint64_t> read_bytes_ = 0;

    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    std::size_t extent_ = 0;         // the next piece begins in this extent,
    std::uint64_t taken_bytes_ = 0;  // after so much of it
    std::uint32_t in_flight_ = 0;
    std::vector<Position> positions_;
    std::vector<std::uint64_t> pieces_of_file_;  // not complete yet
    std::deque<std::uint32_t> read_;             // wait to be given by next_read()
    std::uint32_t published_ = 0;
};

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
    bool end_with(Failure failure);

    std::shared_ptr<Job> job_;
    File* file_;
    Piece piece_;
    Transfer transfer_;
    bool direct_ = false;  // how it was last asked for
};

}  // namespace stoker
