// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>

#include <kvferry/config.hpp>

#include "channel_bindings.hpp"
#include "errors.hpp"
#include "log_records.hpp"
#include "operation.hpp"
#include "transfer_request.hpp"
#if KVFERRY_PYTHON_RDMA
#include <kvferry/rdma_transfer_channel.hpp>

#include "verbs_at_run_time.hpp"
#endif

namespace {

namespace nb = nanobind;

/// The threads and registries of this module are the process's: a second interpreter would be called by threads of the
/// first one's channels.
void check_interpreter() {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    throw nb::import_error("kvferry can only be used in a process's main interpreter, not in a sub-interpreter");
  }
}

nb::list active_rails() {
  nb::list rails;
#if KVFERRY_PYTHON_RDMA
  if (kvferry::python::have_verbs()) {
    for (const kvferry::RdmaRail& rail : kvferry::RdmaTransferChannel::active_rails()) {
      rails.append(nb::make_tuple(nb::str(rail.device.c_str()), static_cast<int>(rail.port)));
    }
  }
#endif
  return rails;
}

}  // namespace

NB_MODULE(_kvferry, module) {
  check_interpreter();
  // What is left when the interpreter exits is left on purpose: channels are closed by then.
  nb::set_leak_warnings(false);
  module.attr("__version__") = KVFERRY_VERSION_STRING;
#if KVFERRY_PYTHON_RDMA
  module.attr("built_with_rdma") = true;
#else
  module.attr("built_with_rdma") = false;
#endif
  module.def("check_interpreter", &check_interpreter);
  module.def("active_rails", &active_rails);
  kvferry::python::bind_errors(module);
  kvferry::python::bind_memory(module);
  kvferry::python::bind_descriptors(module);
  kvferry::python::bind_operation(module);
  kvferry::python::bind_channel(module);
  kvferry::python::bind_log_records(module);
}
