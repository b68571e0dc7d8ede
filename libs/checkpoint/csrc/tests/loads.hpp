// Loads whose pieces a test completes by hand, as an engine would.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "chunk.hpp"
#include "files.hpp"
#include "job.hpp"

namespace loads {

using namespace stoker;

constexpr double kLong = 60;  // seconds: only a failure takes that long
constexpr std::uint32_t kBlock = 1 << 20;

struct Options {
    std::uint32_t window = 0;
    bool hold = false;
    bool recover = false;
    std::uint32_t block_bytes = kBlock;
};

/// Files exist, and their sizes are right, but nothing reads them: pieces are completed by hand.
struct Loads {
    files::Directory directory;

    std::unique_ptr<File> file(std::uint64_t size) {
        const std::string path = directory.write({});
        if (::truncate(path.c_str(), static_cast<off_t>(size)) != 0) throw_errno("truncate");
        return std::make_unique<File>(path, size, files::mtime_ns(path));
    }

    /// One file of whole chunks, each a position.
    std::shared_ptr<Job> of_chunks(std::uint32_t chunks, const Options& options = {}) {
        std::vector<Extent> extents;
        std::vector<std::uint32_t> table;
        for (std::uint32_t chunk = 0; chunk < chunks; ++chunk) {
            extents.push_back({.position = chunk, .file = 0, .offset = chunk * kChunkBytes, .size = kChunkBytes});
            table.push_back(options.window > 0 ? chunk % options.window : chunk);
        }
        std::vector<std::unique_ptr<File>> of_load;
        of_load.push_back(file(chunks * kChunkBytes));
        return of(std::move(of_load), std::move(extents), std::move(table), options);
    }

    static std::shared_ptr<Job> of(std::vector<std::unique_ptr<File>> of_load, std::vector<Extent> extents,
                                   std::vector<std::uint32_t> table, const Options& options = {}) {
        auto board = Board::create(std::move(table), options.window);
        return std::make_shared<Job>(std::move(of_load), std::move(extents), std::move(board), options.block_bytes,
                                     options.hold, options.recover);
    }
};

inline std::vector<Piece> take_all(Job& job) {
    std::vector<Piece> pieces;
    while (const auto piece = job.take()) pieces.push_back(*piece);
    return pieces;
}

/// As an engine does: through the file, which opens and checks it.
inline void complete(Job& job, const Piece& piece) {
    CHECK(!job.file(piece).open());
    job.complete(piece);
}

inline bool readable(const Job& job) {
    pollfd waiting{.fd = job.event_fd(), .events = POLLIN, .revents = 0};
    if (::poll(&waiting, 1, 0) != 1) return false;
    std::uint64_t count;
    CHECK(::read(job.event_fd(), &count, sizeof count) == sizeof count);
    return true;
}

}  // namespace loads
