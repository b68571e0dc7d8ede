#include "view.hpp"

#include <sys/mman.h>

#include <stdexcept>

#include "chunk.hpp"

namespace stoker {

View::View(int pool_fd, std::span<const std::uint32_t> table) {
    const std::size_t chunks = sealed_size(pool_fd) / kChunkBytes;
    if (table.empty()) throw std::invalid_argument("a view of no chunks");
    for (const std::uint32_t chunk : table) {
        if (chunk >= chunks) throw std::invalid_argument("a chunk outside of the pool");
    }
    memory_ = reserve(table.size() * kChunkBytes);
    std::size_t next = 0;
    for (std::size_t first = 0; first < table.size(); first = next) {
        next = first + 1;
        while (next < table.size() && table[next] == table[next - 1] + 1) ++next;
        // Reading maps the pool's own pages; NORESERVE, as few if any are ever written and so copied.
        if (::mmap(data() + first * kChunkBytes, (next - first) * kChunkBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, pool_fd,
                   static_cast<off_t>(table[first] * kChunkBytes)) == MAP_FAILED) {
            throw_errno("mmap");
        }
    }
}

void View::check(std::size_t offset, std::size_t size) const {
    if (offset > this->size() || size > this->size() - offset) throw std::invalid_argument("outside of the view");
}

std::uint64_t View::touch(std::size_t offset, std::size_t size) const {
    check(offset, size);
    const volatile std::byte* const bytes = data();
    std::uint64_t sum = 0;
    // From the range's first byte on, then at every start of a page.
    for (std::size_t at = offset; at < offset + size; at = (at / kAlignBytes + 1) * kAlignBytes) {
        sum += std::to_integer<std::uint64_t>(bytes[at]);
    }
    return sum;
}

void View::privatise(std::size_t offset, std::size_t size) const {
    check(offset, size);
    if (size == 0) return;
    const std::size_t begin = offset / kAlignBytes * kAlignBytes;
    const std::size_t end = (offset + size + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
    if (const int error = advise(data() + begin, end - begin, MADV_POPULATE_WRITE)) throw_errno(error, "madvise");
}

}  // namespace stoker
