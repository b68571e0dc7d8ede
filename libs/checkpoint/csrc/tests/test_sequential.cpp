#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>

#include "check.hpp"
#include "files.hpp"
#include "sequential.hpp"

using namespace stoker;

namespace {

int errno_of(const std::string& path, std::uint64_t size_bytes) {
    try {
        sequential_read(path, size_bytes, 1 << 20);
    } catch (const std::system_error& error) {
        return error.code().value();
    }
    return 0;
}

}  // namespace

TEST(a_file_is_read_to_its_odd_end_and_not_further) {
    files::Directory directory;
    const std::string path = directory.write(files::pattern(1, 3'000'001));
    if (errno_of(path, 1) == EINVAL) SKIP("no O_DIRECT here");
    CHECK(sequential_read(path, 3'000'001, 1 << 20) > 0);
    CHECK(sequential_read(path, 3'000'001, 16 << 20) > 0);
    CHECK(errno_of(path, 3'000'002) == EIO);
    CHECK(errno_of(directory.path() + "/missing", 1) == ENOENT);
    CHECK_THROWS(std::invalid_argument, sequential_read(path, 1, 1000));
    CHECK_THROWS(std::invalid_argument, sequential_read(path, 1, 0));
}
