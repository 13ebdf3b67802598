// SPDX-License-Identifier: Apache-2.0
#include <asio/error.hpp>

#include <cstring>
#include <string>
#include <string_view>

#include <kvferry/error.hpp>

namespace kvferry {
namespace {

std::string_view name_of(errc code) noexcept {
  switch (code) {
    case errc::empty_peer_id: return "empty_peer_id";
    case errc::unknown_peer: return "unknown_peer";
    case errc::self_connection: return "self_connection";
    case errc::invalid_url: return "invalid_url";
    case errc::count_mismatch: return "count_mismatch";
    case errc::unknown_region: return "unknown_region";
    case errc::index_out_of_range: return "index_out_of_range";
    case errc::object_too_large: return "object_too_large";
    case errc::not_in_region: return "not_in_region";
    case errc::access_denied: return "access_denied";
    case errc::notification_too_large: return "notification_too_large";
    case errc::invalid_region: return "invalid_region";
    case errc::not_supported: return "not_supported";
    case errc::would_deadlock: return "would_deadlock";
    case errc::timed_out: return "timed_out";
    case errc::cancelled: return "cancelled";
    case errc::closed: return "closed";
    case errc::peer_cancelled: return "peer_cancelled";
    case errc::buffer_too_small: return "buffer_too_small";
    case errc::resource_limit: return "resource_limit";
    case errc::peer_closed: return "peer_closed";
    case errc::connection_lost: return "connection_lost";
    case errc::peer_restarted: return "peer_restarted";
    case errc::handshake_failed: return "handshake_failed";
    case errc::version_mismatch: return "version_mismatch";
    case errc::transport_mismatch: return "transport_mismatch";
    case errc::page_size_mismatch: return "page_size_mismatch";
    case errc::authentication_failed: return "authentication_failed";
    case errc::protocol_violation: return "protocol_violation";
    case errc::malformed_message: return "malformed_message";
    case errc::unhandled_side_message: return "unhandled_side_message";
    case errc::invalid_peer_id: return "invalid_peer_id";
  }
  return {};
}

/// In the categories of their own that Asio has for name lookups and for the end of a stream.
std::string_view asio_name_of(const std::error_code& code) noexcept {
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

bool is_errno(const std::error_code& code) noexcept {
  const auto& category = code.category();
  return category == std::system_category() || category == std::generic_category() ||
         category == asio::error::get_system_category();
}

}  // namespace

std::string error_name(const std::error_code& code) {
  std::string_view name;
  if (code.category() == error_category()) {
    name = name_of(static_cast<errc>(code.value()));
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
