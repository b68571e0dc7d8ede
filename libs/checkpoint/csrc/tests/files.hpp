// Files of known bytes for the tests of reading.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory.hpp"

namespace files {

/// What a file of this seed holds: eight bytes at a time, no two the same.
inline std::vector<std::byte> pattern(std::uint64_t seed, std::uint64_t size) {
    std::vector<std::byte> bytes(size);
    for (std::uint64_t i = 0; i < size; i += 8) {
        std::uint64_t word = (i / 8 + 1) * 0x9e3779b97f4a7c15 + seed * 0xd1b54a32d192ed03;
        word ^= word >> 29;
        std::memcpy(bytes.data() + i, &word, std::min<std::uint64_t>(8, size - i));
    }
    return bytes;
}

/// A directory that is removed with what lies in it.
class Directory {
   public:
    Directory() {
        const char* const base = std::getenv("TMPDIR");
        path_ = std::string(base != nullptr ? base : "/tmp") + "/stoker-native-XXXXXX";
        if (::mkdtemp(path_.data()) == nullptr) stoker::throw_errno("mkdtemp");
    }
    ~Directory() {
        for (const std::string& file : files_) ::unlink(file.c_str());
        ::rmdir(path_.c_str());
    }
    Directory(const Directory&) = delete;
    Directory& operator=(const Directory&) = delete;

    /// A new file's path, written in full and on its disk.
    std::string write(const std::vector<std::byte>& bytes) {
        const std::string path = path_ + "/" + std::to_string(files_.size());
        stoker::Fd fd(::open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600));
        if (fd.get() < 0) stoker::throw_errno("open");
        files_.push_back(path);
        for (std::size_t done = 0; done < bytes.size();) {
            const ssize_t count = ::write(fd.get(), bytes.data() + done, bytes.size() - done);
            if (count < 0) stoker::throw_errno("write");
            done += static_cast<std::size_t>(count);
        }
        ::fsync(fd.get());
        return path;
    }

    const std::string& path() const { return path_; }

   private:
    std::string path_;
    std::vector<std::string> files_;
};

inline std::int64_t mtime_ns(const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) != 0) stoker::throw_errno("stat");
    return std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

inline std::size_t open_descriptors() {
    std::size_t count = 0;
    for (int fd = 0; fd < 4096; ++fd) count += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
    return count;
}

}  // namespace files
