// A load on its way into device memory: slots of one chunk each, filled from the pool, emptied by a consumer that may be
// another process.
//
// A slot is free -> filling -> filled -> free. The feeder (the pool's owner) fills any free slot with the next position
// and publishes positions in order; the consumer alone says when a slot is free again, in any order. Both meet on a
// RingBoard. Copies are ordered by the host: a position is published once its copy has ended on the device, and a
// consumer frees a slot once its own work on it has ended there, so that no event has to cross processes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "board.hpp"
#include "chunk.hpp"
#include "cuda/driver.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace stoker::cuda {

/// A call of the CUDA driver failed while a ring was fed; Failure::error is its CUresult.
inline constexpr FailureKind kDeviceError{5};

/// Shared memory of a ring that is fed: what lies in which slot, how it ended. A memfd.
///
/// Thread safe. Whoever is killed at any point leaves it usable. The feeder believes nothing that a consumer writes but
/// which slots are free, and a consumer that lies there spoils its own tensors alone.
class RingBoard {
   public:
    static std::shared_ptr<RingBoard> create(std::uint32_t positions, std::uint32_t slots, const Uuid& device);

    /// The board behind `fd`, which stays the caller's. Throws std::invalid_argument if it is none.
    static std::shared_ptr<RingBoard> open(int fd);

    int fd() const { return fd_.get(); }
    std::uint32_t positions() const { return positions_; }
    std::uint32_t slots() const { return slots_; }
    const Uuid& device() const { return device_; }

    // The feeder.

    /// A slot that is free, from now on not free; the first one from `start` on. None after the timeout.
    std::optional<std::uint32_t> take(std::uint32_t start, double timeout_s);

    /// `position`, the next one, is in `slot`.
    void publish(std::uint32_t position, std::uint32_t slot);

    /// End it. The first call wins; later ones change nothing.
    void finish(State state, const Failure& failure = {});

    // Any side.

    std::uint32_t filled() const;  // positions published so far
    State state() const;
    Failure failure() const;  // kind none unless failed

    // The consumer.

    /// True once `position` was published; false after the timeout, or once it ended without that.
    bool wait(std::uint32_t position, double timeout_s) const;

    /// Where a published position was put. Throws std::invalid_argument if it was not published.
    std::uint32_t slot_of(std::uint32_t position) const;

    /// Nothing uses `slot` any more, on the device either.
    void free(std::uint32_t slot);

   private:
    struct Shared;

    RingBoard(Fd fd, Mapping memory);
    void announce();

    const Fd fd_;
    const Mapping memory_;
    Shared* const shared_;
    const std::uint32_t positions_;
    const std::uint32_t slots_;
    const Uuid device_;
    const std::span<std::atomic<std::uint32_t>> taken_;    // of each slot: 0 free
    const std::span<std::atomic<std::uint32_t>> slot_of_;  // of each position
};

/// The memory: `slots` chunks on one device, which another process can map by descriptor. For one load at a time.
class Ring {
   public:
    /// Throws std::invalid_argument for fewer than 2 slots, Error if the device refuses.
    Ring(int device, std::uint32_t slots);

    int fd() const { return fd_.get(); }
    std::uint32_t slots() const { return slots_; }
    Address address(std::uint32_t slot) const { return memory_.address() + slot * kChunkBytes; }
    const Device& device() const { return memory_.device(); }

   private:
    std::uint32_t slots_;
    Fd fd_;
    DeviceMapping memory_;
};

/// What of a position is copied: bytes [offset, offset + size) of its chunk, to the same place in the slot.
struct Span {
    std::uint32_t offset;
    std::uint32_t size;
};

/// Copies a load into a ring as it becomes ready, on a thread of its own. Releases the positions of a window.
class Feeder {
   public:
    /// spans: one per position of `board`. Throws std::invalid_argument if they do not fit.
    Feeder(std::shared_ptr<const Ring> ring, std::shared_ptr<Board> board, std::shared_ptr<const Pool> pool,
           std::vector<Span> spans);

    /// Cancels, then waits for the copies in flight.
    ~Feeder();

    const RingBoard& ring_board() const { return *ring_board_; }

    /// An eventfd that becomes readable, and stays so, once it ended.
    int fd() const { return ended_.get(); }

    void cancel() { cancelled_ = true; }

    /// Whether it ended and touches neither the pool nor the ring any more.
    bool join(double timeout_s) const;

   private:
    void run() noexcept;
    void feed();

    const std::shared_ptr<const Ring> ring_;
    const std::shared_ptr<Board> board_;
    const std::shared_ptr<const Pool> pool_;
    const std::vector<Span> spans_;
    const std::shared_ptr<RingBoard> ring_board_;
    const Fd ended_;
    std::atomic<bool> cancelled_ = false;
    std::thread thread_;
};

/// A consumer's side of a ring, usually in another process.
class RingView {
   public:
    /// The descriptors stay the caller's. Throws std::invalid_argument if the board is none or was made for another
    /// device than `device` is here, Error if the device refuses.
    RingView(int ring_fd, int board_fd, int device);

    RingBoard& board() const { return *board_; }
    Address address(std::uint32_t slot) const { return memory_.address() + slot * kChunkBytes; }

   private:
    std::shared_ptr<RingBoard> board_;
    DeviceMapping memory_;
};

}  // namespace stoker::cuda
