// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <string_view>
#include <vector>

#include <kvferry/transfer_spec.hpp>

#include "memory.hpp"
#include "operation.hpp"

namespace kvferry::python {

/// Turns what Python gave to a transfer into a request whose results go to `operation`, which keeps the memory. Lists of
/// descriptors in arrays are read without calling Python.
/// @param own the channel's regions, for `Pages`.
/// @throws nb::type_error, nb::value_error what can't be understood; Python's own exceptions.
[[nodiscard]] TransferRequest make_request(TransferKind kind, nb::handle objects, std::string peer_id,
                                           const nb::dict& spec, const Regions& own, Operation& operation);

[[nodiscard]] TransferKind kind_of(std::string_view name);

/// Page numbers: an array of uint64 or int64, or a sequence of ints.
[[nodiscard]] std::vector<std::uint64_t> indexes_of(nb::handle given, const char* what);

void bind_descriptors(nb::module_& module);

}  // namespace kvferry::python
