// The device ring as Python sees it; stoker_checkpoint/_native.pyi says what each part promises. cuda::Error is RuntimeError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/driver.hpp"
#include "cuda/ring.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace stoker::cuda {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

/// Waits for its copies without the GIL.
struct BoundFeeder : Feeder {
    using Feeder::Feeder;
    ~BoundFeeder() {
        const nb::gil_scoped_release unlocked;
        cancel();
        join(std::numeric_limits<double>::infinity());
    }
};

auto failure_of(const RingBoard& board) {
    const Failure failure = board.failure();
    return std::tuple(static_cast<std::uint32_t>(failure.kind), failure.file, failure.offset, failure.error);
}

void bind_driver(nb::module_& module) {
    module.attr("DEVICE_ERROR") = static_cast<int>(kDeviceError);
    const auto available = [] {
        const Availability found = availability();
        return std::tuple(found.usable, found.reason);
    };
    const auto pinned_now = [] {
        const Pinned now = pinned();
        return std::tuple(now.bytes, now.reason);
    };
    const auto uuids = [] {
        std::vector<Uuid> found;
        {
            const nb::gil_scoped_release unlocked;
            found = devices();
        }
        nb::list listed;
        for (const Uuid& uuid : found) listed.append(nb::bytes(uuid.bytes.data(), uuid.bytes.size()));
        return listed;
    };
    module.def("cuda_available", available, Unlocked());
    module.def("cuda_devices", uuids);
    module.def("cuda_pinned", pinned_now, Unlocked());
}

void bind_producer(nb::module_& module) {
    nb::class_<Ring>(module, "DeviceRing")
        .def(nb::init<int, std::uint32_t>(), "device"_a, "slots"_a, Unlocked())
        .def("fileno", &Ring::fd)
        .def_prop_ro("slots", &Ring::slots);

    const auto create = [](BoundFeeder* self, std::shared_ptr<const Ring> ring, std::shared_ptr<Board> board,
                           std::shared_ptr<const Pool> pool,
                           const std::vector<std::pair<std::uint32_t, std::uint32_t>>& pairs) {
        std::vector<Span> spans;
        for (const auto& [offset, size] : pairs) spans.push_back({offset, size});
        new (self) BoundFeeder(std::move(ring), std::move(board), std::move(pool), std::move(spans));
    };
    nb::class_<BoundFeeder>(module, "Feeder")
        .def("__init__", create, "ring"_a, "board"_a, "pool"_a, "spans"_a)
        .def("fileno", &BoundFeeder::fd)
        .def_prop_ro("board_fd", [](const BoundFeeder& self) { return self.ring_board().fd(); })
        .def_prop_ro("filled", [](const BoundFeeder& self) { return self.ring_board().filled(); })
        .def_prop_ro("state", [](const BoundFeeder& self) { return static_cast<std::uint32_t>(self.ring_board().state()); })
        .def("failure", [](const BoundFeeder& self) { return failure_of(self.ring_board()); })
        .def("cancel", &BoundFeeder::cancel)
        .def("join", &BoundFeeder::join, "timeout_s"_a, Unlocked());
}

void bind_consumer(nb::module_& module) {
    nb::class_<RingView>(module, "DeviceRingView")
        .def(nb::init<int, int, int>(), "ring_fd"_a, "board_fd"_a, "device"_a, Unlocked())
        .def_prop_ro("positions", [](const RingView& self) { return self.board().positions(); })
        .def_prop_ro("slots", [](const RingView& self) { return self.board().slots(); })
        .def_prop_ro("state", [](const RingView& self) { return static_cast<std::uint32_t>(self.board().state()); })
        .def("failure", [](const RingView& self) { return failure_of(self.board()); })
        .def("wait", [](const RingView& self, std::uint32_t position, double timeout_s) {
            return self.board().wait(position, timeout_s);
        }, "position"_a, "timeout_s"_a, Unlocked())
        .def("slot_of", [](const RingView& self, std::uint32_t position) {
            return self.board().slot_of(position);
        }, "position"_a)
        .def("address", [](const RingView& self, std::uint32_t slot) {
            if (slot >= self.board().slots()) throw std::invalid_argument("no such slot");
            return self.address(slot);
        }, "slot"_a)
        .def("free", [](RingView& self, std::uint32_t slot) { self.board().free(slot); }, "slot"_a);
}

}  // namespace
}  // namespace stoker::cuda

void bind_cuda(nb::module_& module) {
    stoker::cuda::bind_driver(module);
    stoker::cuda::bind_producer(module);
    stoker::cuda::bind_consumer(module);
}
