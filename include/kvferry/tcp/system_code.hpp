// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/error.hpp>

#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Moves an errno from Asio's own category to the standard library's. The latter compares with all of `std::errc`,
/// Asio's only with some.
[[nodiscard]] inline std::error_code system_code(std::error_code ec) noexcept {
  return ec.category() == asio::error::get_system_category() ? std::error_code(ec.value(), std::system_category()) : ec;
}

}  // namespace kvferry::tcp
