// Pool, Board and View as Python sees them, the constants, and std::system_error as OSError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <tuple>
#include <vector>

#include "board.hpp"
#include "chunk.hpp"
#include "cuda/driver.hpp"
#include "pool.hpp"
#include "view.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace stoker {

namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

/// The bytes of one chunk, for a memoryview; keeps the pool alive.
struct ChunkBytes {
    std::shared_ptr<Pool> pool;
    std::uint32_t chunk;

    std::byte* data() const { return pool->chunk_address(chunk); }
    std::size_t size() const { return kChunkBytes; }
};

template <typename Exporter>
int get_buffer(PyObject* self, Py_buffer* buffer, int flags) {
    const auto& exporter = *nb::inst_ptr<Exporter>(self);
    return PyBuffer_FillInfo(buffer, self, exporter.data(), static_cast<Py_ssize_t>(exporter.size()), 0, flags);
}

template <typename Exporter>
PyType_Slot buffer_slots[] = {
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer<Exporter>)},
    {0, nullptr},
};

/// Unmapping a large model takes long: others may run meanwhile, whoever drops the last reference.
struct PyView {
    PyView(int pool_fd, std::span<const std::uint32_t> table) : view(std::make_unique<View>(pool_fd, table)) {}
    ~PyView() {
        const nb::gil_scoped_release unlocked;
        view.reset();
    }

    std::byte* data() const { return view->data(); }
    std::size_t size() const { return view->size(); }

    std::unique_ptr<View> view;
};

Huge huge_of(const std::string& name) {
    if (name == "auto") return Huge::automatic;
    if (name == "hugetlb") return Huge::hugetlb;
    if (name == "collapse") return Huge::collapse;
    if (name == "none") return Huge::none;
    throw std::invalid_argument("huge: auto, hugetlb, collapse or none");
}

void translate_system_error(const std::exception_ptr& error, void*) {
    try {
        std::rethrow_exception(error);
    } catch (const std::system_error& e) {
        const nb::object arguments = nb::make_tuple(e.code().value(), e.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

void bind_constants(nb::module_& module) {
    module.attr("CHUNK_BYTES") = kChunkBytes;
    module.attr("ALIGN_BYTES") = kAlignBytes;
    module.attr("LOADING") = static_cast<int>(State::loading);
    module.attr("DONE") = static_cast<int>(State::done);
    module.attr("FAILED") = static_cast<int>(State::failed);
    module.attr("CANCELLED") = static_cast<int>(State::cancelled);
    module.attr("READ_ERROR") = static_cast<int>(FailureKind::read_error);
    module.attr("TRUNCATED") = static_cast<int>(FailureKind::truncated);
    module.attr("CHANGED") = static_cast<int>(FailureKind::changed);
    module.attr("MISMATCH") = static_cast<int>(FailureKind::mismatch);
    module.attr("SOURCE") = static_cast<int>(FailureKind::source);
}

// Pools and boards are made as shared_ptr and found again by enable_shared_from_this: so C++ threads that hold one own
// it without the Python object, and may drop it without the GIL.
void bind_pool(nb::module_& module) {
    nb::class_<ChunkBytes>(module, "_ChunkBytes", nb::type_slots(buffer_slots<ChunkBytes>));

    const auto create = [](std::uint32_t chunks, const std::string& huge, bool lock, unsigned fault_threads,
                           bool register_cuda) {
        auto pool = Pool::create(chunks, {.huge = huge_of(huge), .lock = lock, .fault_threads = fault_threads});
        if (register_cuda) pool->set_on_warm(cuda::pinner());
        return pool;
    };
    const auto adopt = [](int fd, const std::vector<std::uint32_t>& used, bool lock, unsigned fault_threads,
                          bool register_cuda) {
        auto pool = Pool::adopt(fd, used, {.lock = lock, .fault_threads = fault_threads});
        if (register_cuda) pool->set_on_warm(cuda::pinner());
        return pool;
    };
    const auto chunk = [](Pool& self, std::uint32_t index) {
        if (index >= self.chunks()) throw std::invalid_argument("no such chunk");
        const nb::object bytes = nb::cast(ChunkBytes{self.shared_from_this(), index});
        return nb::steal(PyMemoryView_FromObject(bytes.ptr()));
    };
    const auto free = [](Pool& self, const std::vector<std::uint32_t>& chunks) { self.free(chunks); };
    const auto reader_fd = [](const Pool& self) { return self.reader_fd().release(); };

    nb::class_<Pool>(module, "Pool")
        .def(nb::new_(create), "chunks"_a, nb::kw_only(), "huge"_a = "auto", "lock"_a = true, "fault_threads"_a = 2,
             "register_cuda"_a = false, Unlocked())
        .def_static("adopt", adopt, "fd"_a, "used"_a, nb::kw_only(), "lock"_a = true, "fault_threads"_a = 2,
                    "register_cuda"_a = false, Unlocked())
        .def("fileno", &Pool::fd)
        .def("reader_fd", reader_fd)
        .def("allocate", &Pool::allocate, "count"_a)
        .def("free", free, "chunks"_a)
        .def("chunk", chunk, "index"_a)
        .def("wait_warm", &Pool::wait_warm, "timeout_s"_a, Unlocked())
        .def_prop_ro("chunks_total", &Pool::chunks)
        .def_prop_ro("chunks_free", &Pool::chunks_free)
        .def_prop_ro("chunks_warm", &Pool::chunks_warm)
        .def_prop_ro("chunks_huge", &Pool::chunks_huge)
        .def_prop_ro("chunks_locked", &Pool::chunks_locked)
        .def_prop_ro("pages", &Pool::pages)
        .def_prop_ro("fault_errno", &Pool::fault_errno)
        .def_prop_ro("collapse_errno", &Pool::collapse_errno)
        .def_prop_ro("lock_errno", &Pool::lock_errno)
        .def("close", &Pool::close, Unlocked());
}

void bind_board(nb::module_& module) {
    const auto failure = [](const Board& self) {
        const Failure failure = self.failure();
        return std::tuple(static_cast<std::uint32_t>(failure.kind), failure.file, failure.offset, failure.error);
    };
    nb::class_<Board>(module, "Board")
        .def_static("open", &Board::open, "fd"_a)
        .def("fileno", &Board::fd)
        .def_prop_ro("positions", &Board::positions)
        .def_prop_ro("window", &Board::window)
        .def_prop_ro("table", &Board::table)
        .def_prop_ro("ready_count", &Board::ready_count)
        .def_prop_ro("released", &Board::released)
        .def_prop_ro("state", [](const Board& self) { return static_cast<std::uint32_t>(self.state()); })
        .def("is_ready", &Board::is_ready, "position"_a)
        .def("wait", &Board::wait, "position"_a, "timeout_s"_a, Unlocked())
        .def("release", &Board::release, "position"_a)
        .def("failure", failure);
}

void bind_view(nb::module_& module) {
    const auto create = [](PyView* self, int pool_fd, const std::vector<std::uint32_t>& table) {
        new (self) PyView(pool_fd, table);
    };
    const auto touch = [](const PyView& self, std::size_t offset, std::size_t size) {
        return self.view->touch(offset, size);
    };
    const auto privatise = [](const PyView& self, std::size_t offset, std::size_t size) {
        self.view->privatise(offset, size);
    };
    nb::class_<PyView>(module, "View", nb::type_slots(buffer_slots<PyView>), nb::is_weak_referenceable())
        .def("__init__", create, "pool_fd"_a, "table"_a)
        .def_prop_ro("size_bytes", &PyView::size)
        .def_prop_ro("address", [](const PyView& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
        .def("touch", touch, "offset"_a, "size"_a, Unlocked())
        .def("privatise", privatise, "offset"_a, "size"_a, Unlocked());
}

}  // namespace

}  // namespace stoker

void bind_memory(nb::module_& module) {
    nb::register_exception_translator(stoker::translate_system_error);
    stoker::bind_constants(module);
    stoker::bind_pool(module);
    stoker::bind_board(module);
    stoker::bind_view(module);
}
