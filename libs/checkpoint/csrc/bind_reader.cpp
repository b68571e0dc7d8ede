// Reader and Load as Python sees them. bind_memory.cpp binds what they share and turns std::system_error into OSError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "reader.hpp"
#include "sequential.hpp"
#include "uring.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace stoker {

namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

/// What threads and locks of this process stand behind. A forked child has none of those threads, and the locks may be
/// held for ever there: it may only forget what it inherited.
template <typename T>
class OfThisProcess {
   public:
    explicit OfThisProcess(std::shared_ptr<T> value) : value_(std::move(value)) {}
    OfThisProcess(const OfThisProcess&) = delete;
    OfThisProcess& operator=(const OfThisProcess&) = delete;
    ~OfThisProcess() {
        if (inherited()) new std::shared_ptr<T>(std::move(value_));  // never destroyed
    }

    bool inherited() const { return ::getpid() != owner_; }
    T* operator->() const {
        if (inherited()) throw std::runtime_error("a reader and its loads belong to the process that made them");
        return value_.get();
    }

   private:
    std::shared_ptr<T> value_;
    const pid_t owner_ = ::getpid();
};

struct PyLoad {
    explicit PyLoad(std::shared_ptr<Job> load) : job(std::move(load)) {}
    ~PyLoad() { cancel(); }
    void cancel() {
        const nb::gil_scoped_release unlocked;
        if (!job.inherited()) job->cancel();
    }

    OfThisProcess<Job> job;
};

struct PyReader {
    PyReader(std::shared_ptr<Pool> pool, std::string engine, std::uint32_t depth, std::uint32_t block_bytes)
        : reader(std::make_shared<Reader>(std::move(pool), std::move(engine), depth, block_bytes)) {}
    ~PyReader() { close(); }
    void close() {
        const nb::gil_scoped_release unlocked;
        if (!reader.inherited()) reader->close();
    }

    OfThisProcess<Reader> reader;
};

using Files = std::vector<std::tuple<std::filesystem::path, std::uint64_t, std::int64_t>>;  // it need not be UTF-8
using Extents = std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint64_t, std::uint64_t>>;

std::unique_ptr<PyLoad> start(PyReader& self, Files files, const Extents& extents, std::vector<std::uint32_t> table,
                              std::uint32_t window, bool hold, bool recover, int priority) {
    const nb::gil_scoped_release unlocked;
    LoadSpec spec;
    spec.table = std::move(table);
    spec.window = window;
    spec.hold = hold;
    spec.recover = recover;
    spec.priority = priority;
    for (auto& [path, size_bytes, mtime_ns] : files) {
        if (size_bytes > std::numeric_limits<std::int64_t>::max()) throw std::invalid_argument("no file is so large");
        spec.files.push_back({std::move(path), size_bytes, mtime_ns});
    }
    for (const auto& [position, file, offset, size] : extents) spec.extents.push_back({position, file, offset, size});
    return std::make_unique<PyLoad>(self.reader->start(std::move(spec)));
}

Failure failure_of(std::uint32_t kind, std::uint32_t file, std::uint64_t offset, int error) {
    const auto of_kind = static_cast<FailureKind>(kind);
    const bool known = of_kind >= FailureKind::read_error && of_kind <= FailureKind::mismatch;
    if (!known && of_kind != FailureKind::source) throw std::invalid_argument("no kind of failure");
    return {.kind = of_kind, .file = file, .offset = offset, .error = error};
}

void fail(PyLoad& self, std::uint32_t kind, std::uint32_t file, std::uint64_t offset, int error) {
    self.job->fail(failure_of(kind, file, offset, error));
}

void reject(PyLoad& self, std::uint32_t position, std::uint32_t kind, std::uint32_t file, std::uint64_t offset) {
    self.job->reject(position, failure_of(kind, file, offset, 0));
}

using Failed = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint64_t, int>;

std::optional<Failed> next_failed(PyLoad& self) {
    const auto rejected = self.job->next_failed();
    if (!rejected) return std::nullopt;
    const Failure& why = rejected->failure;
    return Failed(rejected->position, static_cast<std::uint32_t>(why.kind), why.file, why.offset, why.error);
}

void bind_load(nb::module_& module) {
    const auto next_read = [](PyLoad& self, double timeout_s) { return self.job->next_read(timeout_s); };
    const auto publish = [](PyLoad& self, std::uint32_t position) { self.job->publish(position); };
    const auto window_open = [](const PyLoad& self, std::uint32_t position) { return self.job->window_open(position); };
    const auto join = [](PyLoad& self, double timeout_s) { return self.job->join(timeout_s); };

    nb::class_<PyLoad>(module, "Load")
        .def_prop_ro("board", [](const PyLoad& self) { return self.job->shared_board(); })
        .def_prop_ro("direct", [](const PyLoad& self) { return self.job->direct(); })
        .def_prop_ro("read_bytes", [](const PyLoad& self) { return self.job->read_bytes(); })
        .def_prop_ro("unsettled", [](const PyLoad& self) { return self.job->unsettled(); })
        .def("fileno", [](const PyLoad& self) { return self.job->event_fd(); })
        .def("next_read", next_read, "timeout_s"_a, Unlocked())
        .def("publish", publish, "position"_a, Unlocked())
        .def("reject", reject, "position"_a, "kind"_a, "file"_a, "offset"_a, Unlocked())
        .def("next_failed", next_failed)
        .def("window_open", window_open, "position"_a)
        .def("fail", fail, "kind"_a, "file"_a, "offset"_a, "errno"_a, Unlocked())
        .def("cancel", &PyLoad::cancel)
        .def("join", join, "timeout_s"_a, Unlocked());
}

void bind_reader_class(nb::module_& module) {
    // A load keeps its reader alive: dropping the reader would cancel it.
    nb::class_<PyReader>(module, "Reader")
        .def(nb::init<std::shared_ptr<Pool>, std::string, std::uint32_t, std::uint32_t>(), "pool"_a, "engine"_a,
             nb::kw_only(), "depth"_a, "block_bytes"_a)
        .def_prop_ro("engine", [](const PyReader& self) { return self.reader->engine(); })
        .def_prop_ro("registered_buffers", [](const PyReader& self) { return self.reader->registered_buffers(); })
        .def("start", start, "files"_a, "extents"_a, "table"_a, nb::kw_only(), "window"_a = 0, "hold"_a = false,
             "recover"_a = false, "priority"_a = 0, nb::keep_alive<0, 1>())
        .def("close", &PyReader::close);
}

}  // namespace

}  // namespace stoker

void bind_reader(nb::module_& module) {
    stoker::bind_reader_class(module);
    stoker::bind_load(module);
    module.def("io_uring_errno", &stoker::io_uring_errno);
    module.def("sequential_read", &stoker::sequential_read, "path"_a, "size_bytes"_a, nb::kw_only(), "block_bytes"_a,
               stoker::Unlocked());
}
