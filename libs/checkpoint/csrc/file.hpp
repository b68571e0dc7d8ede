// A file that is read once: opened when its first piece is due, and checked against what was registered, then and at
// its end.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "board.hpp"
#include "memory.hpp"

namespace stoker {

/// Thread safe. Failures carry file index 0: a file does not know its own.
class File {
   public:
    /// mtime_ns: -1 is not checked.
    File(std::string path, std::uint64_t size_bytes, std::int64_t mtime_ns);

    /// What is behind `fd` already, unchecked.
    File(Fd fd, std::uint64_t size_bytes, bool direct);

    /// The first call opens, O_DIRECT if the file system takes it; the others wait for it and get the same answer.
    ///
    /// Fails if that is impossible, for what is no regular file, and if size or mtime differ.
    std::optional<Failure> open();

    /// Whether size and mtime still are what open() found.
    std::optional<Failure> check() const;

    /// Go on without O_DIRECT; of several calls the first one does it.
    void use_page_cache();

    /// No read of it may be in flight, and none may follow.
    void close();

    int fd() const { return fd_.get(); }
    bool direct() const { return direct_.load(std::memory_order_acquire); }
    std::uint64_t size_bytes() const { return size_bytes_; }

   private:
    std::optional<Failure> open_once();
    std::optional<Failure> compare(std::uint64_t size_bytes, std::int64_t mtime_ns) const;

    const std::string path_;
    const std::uint64_t size_bytes_;
    std::int64_t mtime_ns_;  // from open() on never -1

    std::mutex mutex_;
    Fd fd_;
    bool opened_ = false;
    std::optional<Failure> refused_;
    std::atomic<bool> direct_ = true;
};

}  // namespace stoker
