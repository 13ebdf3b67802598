// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace kvferry::python {

namespace nb = nanobind;

void bind_channel(nb::module_& module);

}  // namespace kvferry::python
