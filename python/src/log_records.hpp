// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace kvferry::python {

namespace nb = nanobind;

/// Log records on their way to Python's `logging`: they are kept until a thread of Python's takes them, as the threads on
/// which they are made may hold a lock of the channel's and mustn't wait for the GIL.
void bind_log_records(nb::module_& module);

}  // namespace kvferry::python
