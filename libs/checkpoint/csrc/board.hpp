// Shared memory of one load: its chunk table, which positions are ready, how it ended.
//
// One process creates and writes it; any number open it by descriptor and wait. Waiting is a shared futex on one event
// word that every change increments, so no wake-up is missed and a spurious one only looks again. Whoever is killed at
// any point leaves the board usable: nothing in it is ever locked.
//
// Only `released` is written by consumers. A reader looks at it before it begins a read, and every millisecond while
// nothing but full windows hold it back: a chunk takes longer to read, and one thread can so serve many boards.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "memory.hpp"

namespace stoker {

enum class State : std::uint32_t { loading = 0, done = 1, failed = 2, cancelled = 3 };

enum class FailureKind : std::uint32_t {
    none = 0,
    read_error = 1,  // the kernel's errno
    truncated = 2,   // the file ended before its registered size
    changed = 3,     // size or mtime differ from those given
    mismatch = 4,    // a digest differs
    source = 6,      // what belongs there cannot be had from anywhere; 5 is kDeviceError of rings
};

struct Failure {
    FailureKind kind = FailureKind::none;
    std::uint32_t file = 0;    // index
    std::uint64_t offset = 0;  // bytes, in the file
    int error = 0;             // errno
};

/// Thread safe. Methods that take a position throw std::invalid_argument if there is no such position.
class Board : public std::enable_shared_from_this<Board> {
   public:
    /// table: position -> pool chunk.  window: 0, or the number of chunks that the table repeats.
    ///
    /// Throws std::invalid_argument if the table is empty or does not repeat as the window says.
    static std::shared_ptr<Board> create(std::vector<std::uint32_t> table, std::uint32_t window);

    /// The board behind `fd`, which stays the caller's. Throws std::invalid_argument if it is none.
    static std::shared_ptr<Board> open(int fd);

    int fd() const { return fd_.get(); }
    std::uint32_t positions() const { return static_cast<std::uint32_t>(table_.size()); }
    std::uint32_t window() const { return window_; }
    const std::vector<std::uint32_t>& table() const { return table_; }  // a copy, which no other process can change

    // The side that reads files. Only the process that created the board calls these.

    /// What the position's chunk holds is final: it happens before any wait() that sees it. Repeating it does nothing.
    void mark_ready(std::uint32_t position);

    /// End the load. The first call wins and returns true; later ones change nothing.
    bool finish(State state, const Failure& failure = {});

    /// Consumers are done with all positions below this one (acquire: their reads of them have happened).
    std::uint32_t released() const;

    // Any side.

    std::uint32_t ready_count() const;
    State state() const;
    Failure failure() const;  // kind none unless failed
    bool is_ready(std::uint32_t position) const;

    // Consumers.

    /// True once `position` is ready; false after the timeout, or once the load ended without it.
    bool wait(std::uint32_t position, double timeout_s) const;

    /// Done with all positions below `position` (0 to positions()). Never goes back.
    void release(std::uint32_t position);

   private:
    struct Shared;

    Board(Fd fd, Mapping memory, std::vector<std::uint32_t> table, std::uint32_t window);
    void check(std::uint32_t position) const;
    void announce();

    const Fd fd_;
    const Mapping memory_;
    const std::vector<std::uint32_t> table_;
    const std::uint32_t window_;
    Shared* const shared_;
    const std::span<std::atomic<std::uint64_t>> ready_;  // bit p % 64 of word p / 64
    std::mutex finish_mutex_;
};

}  // namespace stoker
