// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/error.hpp>

#include <cstring>
#include <string>
#include <string_view>

#include <kvferry/detail/error_codes.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

/// In the categories of their own that Asio has for name lookups and for the end of a stream.
KVFERRY_INLINE std::string_view asio_name_of(const std::error_code& code) noexcept {
  if (code == asio::error::eof) {
    return "eof";
  }
  if (code == asio::error::host_not_found) {
    return "host_not_found";
  }
  if (code == asio::error::host_not_found_try_again) {
    return "host_not_found_try_again";
  }
  if (code == asio::error::no_data) {
    return "no_data";
  }
  if (code == asio::error::no_recovery) {
    return "no_recovery";
  }
  if (code == asio::error::service_not_found) {
    return "service_not_found";
  }
  return {};
}

KVFERRY_INLINE bool is_errno(const std::error_code& code) noexcept {
  const auto& category = code.category();
  return category == std::system_category() || category == std::generic_category() ||
         category == asio::error::get_system_category();
}

}  // namespace internal

KVFERRY_INLINE std::string error_name(const std::error_code& made) {
  const std::error_code code = of_this_copy(made);
  std::string_view name;
  if (code.category() == error_category()) {
    name = errc_name(code.value());
  } else if (is_errno(code)) {
#ifdef __GLIBC__
    if (const char* const symbol = ::strerrorname_np(code.value())) {
      name = symbol;
    }
#endif
  } else {
    name = asio_name_of(code);
  }
  return name.empty() ? std::to_string(code.value()) : std::string(name);
}

}  // namespace kvferry
