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

/// A position that its file cannot give.
struct Rejected {
    std::uint32_t position;
    Failure failure;
};

/// Thread safe.
class Job {
   public:
    /// extents: ascending by position, at least one for each.  hold: positions wait for publish().
    ///
    /// recover: it holds, and what cannot be read is the owner's to write into the position's chunk and publish: positions
    /// without extents from the start, those of files from next_failed() on. No file ever fails the load.
    /// Throws std::invalid_argument for what breaks the rules of Extent and Board.
    Job(std::vector<std::unique_ptr<File>> files, std::vector<Extent> extents, std::shared_ptr<Board> board,
        std::uint32_t block_bytes, bool hold, bool recover = false);

    // Engines. Each piece taken is given back once, by complete(), give_up() or abandon().

    /// The next piece, in file order. None when the window is full, when all are taken, or after the end.
    std::optional<Piece> take();

    /// Whether take() would give a piece if asked now.
    bool due() const;

    /// Nothing will be taken any more.
    bool spent() const;

    File& file(const Piece& piece) { return *files_[piece.file]; }
    void complete(const Piece& piece);

    /// It cannot be read: the end of the load, or of reading its position in a load that recovers.
    void give_up(const Piece& piece, Failure failure);

    /// After the end of the load.
    void abandon(const Piece& piece);
    void count(std::uint64_t bytes) { read_bytes_.fetch_add(bytes, std::memory_order_relaxed); }
    void lose_direct() { direct_.store(false, std::memory_order_relaxed); }

    // The owner.

    Board& board() const { return *board_; }
    const std::shared_ptr<Board>& shared_board() const { return board_; }
    bool direct() const { return direct_.load(std::memory_order_relaxed); }
    std::uint64_t read_bytes() const { return read_bytes_.load(std::memory_order_relaxed); }

    /// An eventfd: readable after a position was read (hold), became ready or was handed to the owner, and once join() has
    /// something new to say.
    int event_fd() const { return event_.get(); }

    /// A position that was read and waits for publish(); each is given once. None after the timeout, once none is
    /// unsettled, and after the end.
    std::optional<std::uint32_t> next_read(double timeout_s);

    /// Throws std::invalid_argument for a position that does not wait for it, or whose window is not open. After the end
    /// it does nothing.
    void publish(std::uint32_t position);

    /// What was read of a position is wrong: it is the owner's now. For loads that recover; else as publish().
    void reject(std::uint32_t position, const Failure& failure);

    /// A position of a file that is the owner's from now on, and why; each is given once. Does not wait.
    std::optional<Rejected> next_failed();

    /// Positions of files that are neither published nor the owner's. None after the end.
    std::uint32_t unsettled() const;

    /// Whether the position's chunk may be written to: what streamed through it before was published and released.
    /// Throws std::invalid_argument for no position.
    bool window_open(std::uint32_t position) const;

    // How a load ends. The first end counts.

    void fail(const Failure& failure);
    void cancel();
    bool ended() const { return board_->state() != State::loading; }

    /// Whether it has ended and no read is in flight: its chunks are not written any more.
    bool join(double timeout_s);

   private:
    enum class Reading : std::uint8_t {
        pending,    // pieces of it are in flight or not taken
        lost,       // one of them cannot be read: owned, once none is in flight
        waiting,    // all were read: for publish() or reject()
        owned,      // for publish()
        published,
    };
    struct Position {
        std::uint32_t pieces = 0;  // not complete yet
        std::uint32_t in_flight = 0;
        Reading reading = Reading::pending;
        Failure failure;  // why its file cannot give it
    };

    void check() const;
    Position& at(std::uint32_t position);
    std::uint64_t pieces_of(std::uint64_t size) const { return (size + block_bytes_ - 1) / block_bytes_; }
    bool reusable(std::uint32_t position) const;
    void finish(State state, const Failure& failure);
    void lose(std::uint32_t position, const Failure& failure);
    void hand_over(std::uint32_t position);
    void drop_pieces(std::uint32_t file, std::uint64_t pieces);
    void make_ready(std::uint32_t position);
    void one_settled();
    void put_back(const Piece& piece);
    void settle();
    void signal();

    const std::vector<std::unique_ptr<File>> files_;
    const std::vector<Extent> extents_;
    const std::shared_ptr<Board> board_;
    const std::uint32_t block_bytes_;
    const bool hold_;
    const bool recover_;
    const Fd event_;

    std::atomic<bool> direct_ = true;
    std::atomic<std::uint64_t> read_bytes_ = 0;

    mutable std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    std::size_t extent_ = 0;         // the next piece begins in this extent,
    std::uint64_t taken_bytes_ = 0;  // after so much of it
    std::uint32_t in_flight_ = 0;
    std::vector<Position> positions_;
    std::vector<std::uint64_t> pieces_of_file_;  // neither complete nor given up yet
    std::deque<std::uint32_t> read_;             // wait to be given by next_read(),
    std::deque<Rejected> failed_;                // or by next_failed()
    std::uint32_t unsettled_ = 0;
    std::uint32_t published_ = 0;
};

}  // namespace stoker
