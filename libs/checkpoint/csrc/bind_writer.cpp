// Writer as Python sees it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <filesystem>
#include <tuple>
#include <vector>

#include "writer.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace stoker {

namespace {

std::uint64_t write(Writer& self, int fd, nb::handle data, std::uint64_t offset) {
    Py_buffer buffer;
    if (PyObject_GetBuffer(data.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw nb::python_error();
    const auto* const bytes = static_cast<const std::byte*>(buffer.buf);
    const auto size = static_cast<std::size_t>(buffer.len);
    PyBuffer_Release(&buffer);  // the caller keeps it
    return self.write(fd, bytes, size, offset);
}

std::uint64_t open(Writer& self, const std::filesystem::path& path, int flags, unsigned mode) {
    return self.open(path.string(), flags, mode);
}

std::uint64_t rename(Writer& self, const std::filesystem::path& from, const std::filesystem::path& to) {
    return self.rename(from.string(), to.string());
}

std::vector<std::tuple<std::uint64_t, std::int64_t>> take_done(Writer& self) {
    std::vector<std::tuple<std::uint64_t, std::int64_t>> all;
    for (const Writer::Done& done : self.take_done()) all.emplace_back(done.ticket, done.result);
    return all;
}

}  // namespace

}  // namespace stoker

void bind_writer(nb::module_& module) {
    using stoker::Writer;
    nb::class_<Writer>(module, "Writer")
        .def(nb::init<std::uint32_t>(), "threads"_a)
        .def("fileno", &Writer::event_fd)
        .def("write", stoker::write, "fd"_a, "data"_a, "offset"_a)
        .def("sync", &Writer::sync, "fd"_a)
        .def("open", stoker::open, "path"_a, "flags"_a, "mode"_a)
        .def("rename", stoker::rename, "source"_a, "target"_a)
        .def("take_done", stoker::take_done)
        .def("close", &Writer::close, nb::call_guard<nb::gil_scoped_release>());
}
