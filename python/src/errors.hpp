// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <span>
#include <string>
#include <system_error>

namespace kvferry::python {

namespace nb = nanobind;

/// A `kvferry.TransferError` for Python, not thrown yet. The GIL is held.
/// @param statuses the cause for each object, or nothing.
[[nodiscard]] nb::object make_error(const std::error_code& code, const std::string& text, std::size_t transferred = 0,
                                    std::span<const std::error_code> statuses = {});

/// `error_name` for each, None for success.
[[nodiscard]] nb::tuple names_of(std::span<const std::error_code> statuses);

/// Raises it.
[[noreturn]] void raise(const nb::object& error);

/// Lets a `kvferry::TransferError` that leaves a bound function arrive as that.
void bind_errors(nb::module_& module);

}  // namespace kvferry::python
