#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

namespace stoker {

namespace {

constexpr std::int64_t kUnchecked = -1;

Failure read_error(int error) { return {.kind = FailureKind::read_error, .error = error}; }

std::int64_t mtime_ns(const struct stat& status) {
    return std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

int open_for_reading(const char* path, int flags) {
    int fd;
    do {  // O_NONBLOCK: opening a FIFO would wait for its writer
        fd = ::open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | flags);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

}  // namespace

File::File(std::string path, std::uint64_t size_bytes, std::int64_t mtime_ns)
    : path_(std::move(path)), size_bytes_(size_bytes), mtime_ns_(mtime_ns) {}

File::File(Fd fd, std::uint64_t size_bytes, bool direct)
    : size_bytes_(size_bytes), mtime_ns_(kUnchecked), fd_(std::move(fd)), opened_(true), direct_(direct) {}

std::optional<Failure> File::open() {
    const std::lock_guard guard(mutex_);
    if (!opened_) {
        opened_ = true;
        refused_ = open_once();
    }
    return refused_;
}

std::optional<Failure> File::open_once() {
    int fd = open_for_reading(path_.c_str(), O_DIRECT);
    if (fd < 0 && errno == EINVAL) {
        direct_ = false;
        fd = open_for_reading(path_.c_str(), 0);
    }
    if (fd < 0) return read_error(errno);
    fd_ = Fd(fd);

    struct stat status{};
    if (::fstat(fd, &status) != 0) return read_error(errno);
    if (!S_ISREG(status.st_mode)) return read_error(S_ISDIR(status.st_mode) ? EISDIR : EINVAL);
    // The ring takes O_NONBLOCK literally and answers EAGAIN instead of waiting for the disk.
    if (::fcntl(fd, F_SETFL, direct_ ? O_DIRECT : 0) != 0) return read_error(errno);
    const auto failure = compare(static_cast<std::uint64_t>(status.st_size), mtime_ns(status));
    mtime_ns_ = mtime_ns(status);
    return failure;
}

std::optional<Failure> File::compare(std::uint64_t size_bytes, std::int64_t mtime_ns) const {
    if (size_bytes < size_bytes_) return Failure{.kind = FailureKind::truncated, .offset = size_bytes};
    if (size_bytes > size_bytes_ || (mtime_ns_ != kUnchecked && mtime_ns != mtime_ns_)) {
        return Failure{.kind = FailureKind::changed};
    }
    return std::nullopt;
}

std::optional<Failure> File::check() const {
    struct stat status{};
    if (::fstat(fd_.get(), &status) != 0) return read_error(errno);
    return compare(static_cast<std::uint64_t>(status.st_size), mtime_ns(status));
}

void File::use_page_cache() {
    const std::lock_guard guard(mutex_);
    if (!direct_) return;
    ::fcntl(fd_.get(), F_SETFL, 0);  // if even this is refused, the next read says so
    direct_.store(false, std::memory_order_release);
}

void File::close() {
    const std::lock_guard guard(mutex_);
    fd_ = Fd();
}

}  // namespace stoker
