// stoker_checkpoint._native: what Python sees. stoker_checkpoint/_native.pyi says what each part promises.
#include <nanobind/nanobind.h>

void bind_memory(nanobind::module_& module);
void bind_reader(nanobind::module_& module);
void bind_writer(nanobind::module_& module);
void bind_cuda(nanobind::module_& module);

NB_MODULE(_native, module) {
    // What is alive when the interpreter ends (tensors over a view, say) is the process's business, and goes with it.
    nanobind::set_leak_warnings(false);
    bind_memory(module);
    bind_reader(module);
    bind_writer(module);
    bind_cuda(module);
}
