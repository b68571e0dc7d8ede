#include "writer.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <stdexcept>
#include <utility>

#include "thread.hpp"

namespace stoker {

namespace {

std::int64_t result_of(const std::function<std::int64_t()>& call) {
    std::int64_t result;
    do {
        result = call();
    } while (result < 0 && errno == EINTR);
    return result < 0 ? -static_cast<std::int64_t>(errno) : result;
}

}  // namespace

Writer::Writer(std::uint32_t threads) : event_(create_event()) {
    if (threads == 0 || threads > kThreadsMax) throw std::invalid_argument("threads are not within 1 to 64");
    try {
        while (threads_.size() < threads) threads_.push_back(start_thread("stoker-write", [this] { run(); }));
    } catch (...) {
        close();
        throw;
    }
}

Writer::~Writer() { close(); }

std::uint64_t Writer::write(int fd, const std::byte* data, std::size_t size, std::uint64_t offset) {
    if (data == nullptr || size == 0) throw std::invalid_argument("there is nothing to write");
    return add([=] { return ::pwrite(fd, data, size, static_cast<off_t>(offset)); });
}

std::uint64_t Writer::sync(int fd) {
    return add([=] { return ::fdatasync(fd); });
}

std::uint64_t Writer::open(std::string path, int flags, unsigned mode) {
    return add([=, path = std::move(path)] { return ::open(path.c_str(), flags | O_CLOEXEC, mode); });
}

std::uint64_t Writer::rename(std::string from, std::string to) {
    return add([from = std::move(from), to = std::move(to)] { return std::rename(from.c_str(), to.c_str()); });
}

std::uint64_t Writer::add(Call call) {
    const std::lock_guard guard(mutex_);
    if (closed_) throw std::logic_error("the writer is closed");
    if (queue_.size() >= kQueuedMax) throw std::invalid_argument("too many calls at once");
    queue_.push_back({tickets_, std::move(call)});
    changed_.notify_one();
    return tickets_++;
}

std::vector<Writer::Done> Writer::take_done() {
    const std::lock_guard guard(mutex_);
    eventfd_t count;
    ::eventfd_read(event_.get(), &count);  // whatever it said: all of it is taken now
    return std::exchange(done_, {});
}

void Writer::close() {
    const std::lock_guard closing(closing_mutex_);
    {
        const std::lock_guard guard(mutex_);
        closed_ = true;
        changed_.notify_all();
    }
    for (std::thread& thread : threads_) {
        if (thread.joinable()) thread.join();
    }
}

void Writer::run() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
        if (queue_.empty()) return;
        const Work work = std::move(queue_.front());
        queue_.pop_front();
        lock.unlock();
        const std::int64_t result = result_of(work.call);
        lock.lock();
        done_.push_back({work.ticket, result});
        ::eventfd_write(event_.get(), 1);
    }
}

}  // namespace stoker
