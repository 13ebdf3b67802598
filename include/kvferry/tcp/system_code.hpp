// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/error.hpp>

#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// An errno that Asio carries in a category of its own, as the standard library's: that one compares with all of
/// `std::errc`, Asio's with some.
[[nodiscard]] inline std::error_code system_code(std::error_code ec) noexcept {
  return ec.category() == asio::error::get_system_category() ? std::error_code(ec.value(), std::system_category()) : ec;
}

}  // namespace kvferry::tcp
