// SPDX-License-Identifier: Apache-2.0
#include <kvferry/error.hpp>

#include <asio/error.hpp>

#include <algorithm>
#include <array>
#include <cerrno>

#include "never_destroyed.hpp"

namespace kvferry {
namespace {

std::string_view message_of(errc code) noexcept {
  switch (code) {
    case errc::empty_peer_id: return "the peer id is empty";
    case errc::unknown_peer: return "no handshake with this peer has taken place";
    case errc::self_connection: return "the url leads back to this channel";
    case errc::invalid_url: return "the url is neither tcp://host:port nor host:port";
    case errc::count_mismatch: return "numbers that must be equal differ";
    case errc::unknown_region: return "there is no region of this number";
    case errc::index_out_of_range: return "the page index lies behind the last page of the region";
    case errc::object_too_large: return "the object is larger than its page";
    case errc::not_in_region: return "the buffer does not start at a page of the region";
    case errc::access_denied: return "the region does not allow this access";
    case errc::notification_too_large: return "the notification is too large";
    case errc::invalid_region: return "the region's size is not a positive multiple of its page size";
    case errc::not_supported: return "the transport does not support this";
    case errc::would_deadlock: return "a blocking call on the thread that would have to complete it";
    case errc::timed_out: return "the deadline passed";
    case errc::cancelled: return "the operation was cancelled";
    case errc::closed: return "the channel is closed";
    case errc::peer_cancelled: return "the peer timed out or cancelled its side";
    case errc::buffer_too_small: return "the receiver's buffer is smaller than the object";
    case errc::resource_limit: return "a bounded queue is full";
    case errc::peer_closed: return "the peer closed the connection";
    case errc::connection_lost: return "the connection to the peer broke";
    case errc::peer_restarted: return "the peer restarted";
    case errc::handshake_failed: return "the handshake failed";
    case errc::page_size_mismatch: return "the page sizes differ";
    case errc::version_mismatch: return "the peer speaks another protocol version";
    case errc::transport_mismatch: return "the peer uses another transport";
    case errc::authentication_failed: return "a data connection did not prove that it belongs to the peer";
    case errc::protocol_violation: return "the peer violated the protocol";
    case errc::malformed_message: return "the side message is malformed";
    case errc::unhandled_side_message: return "the peer has no answer to this side message";
    case errc::invalid_peer_id: return "the peer id is too long, not UTF-8, or has control characters";
  }
  return "unknown error";
}

std::string_view message_of(condition value) noexcept {
  switch (value) {
    case condition::invalid_argument: return "an argument is invalid";
    case condition::peer_failed: return "the peer or the way to it is gone";
    case condition::retryable: return "the same call may succeed later";
    case condition::cancelled: return "ended from this side";
    case condition::timed_out: return "the deadline passed";
  }
  return "unknown condition";
}

class ErrorCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "kvferry"; }

  [[nodiscard]] std::string message(int value) const override {
    return std::string(message_of(static_cast<errc>(value)));
  }

  [[nodiscard]] std::error_condition default_error_condition(int value) const noexcept override {
    switch (static_cast<errc>(value)) {
      case errc::cancelled: return std::errc::operation_canceled;
      case errc::timed_out: return std::errc::timed_out;
      default: return {value, *this};
    }
  }
};

/// Asio 1.22 has a category of its own for errno values and compares them with no `std::errc`.
std::error_code without_asio_category(const std::error_code& code) noexcept {
  const bool is_errno = code.category() == asio::error::get_system_category();
  return is_errno ? std::error_code(code.value(), std::system_category()) : code;
}

template <class Code, std::size_t Size>
bool is_any_of(const std::error_code& code, const std::array<Code, Size>& list) noexcept {
  return std::ranges::any_of(list, [&code](Code one) { return code == one; });
}

bool is_invalid_argument(const std::error_code& code) noexcept {
  static constexpr std::array own{
      errc::empty_peer_id,          errc::unknown_peer,   errc::self_connection,    errc::invalid_url,
      errc::count_mismatch,         errc::unknown_region, errc::index_out_of_range, errc::object_too_large,
      errc::not_in_region,          errc::access_denied,  errc::invalid_region,     errc::not_supported,
      errc::notification_too_large, errc::would_deadlock, errc::invalid_peer_id};
  return is_any_of(code, own) || code == std::errc::invalid_argument;
}

bool is_peer_failed(const std::error_code& code) noexcept {
  static constexpr std::array own{errc::peer_closed, errc::connection_lost, errc::peer_restarted};
  static constexpr std::array system{
      std::errc::connection_reset, std::errc::connection_refused, std::errc::connection_aborted,
      std::errc::broken_pipe,      std::errc::host_unreachable,   std::errc::network_unreachable,
      std::errc::network_down,     std::errc::network_reset,      std::errc::not_connected};
  // A name that does not resolve may belong to a peer that is being rescheduled.
  static constexpr std::array resolver{asio::error::host_not_found, asio::error::host_not_found_try_again};
  return is_any_of(code, own) || is_any_of(code, system) || is_any_of(code, resolver) || code == asio::error::eof ||
         code == std::error_code(EHOSTDOWN, std::system_category());
}

bool is_timed_out(const std::error_code& code) noexcept { return code == std::errc::timed_out; }

bool is_cancelled(const std::error_code& code) noexcept {
  return code == errc::closed || code == std::errc::operation_canceled;
}

bool is_retryable(const std::error_code& code) noexcept {
  static constexpr std::array own{errc::resource_limit, errc::peer_cancelled};
  // The same page indexes would be the wrong ones.
  const bool stale = code == errc::peer_restarted;
  return is_any_of(code, own) || (is_peer_failed(code) && !stale) || is_timed_out(code);
}

class ConditionCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "kvferry.condition"; }

  [[nodiscard]] std::string message(int value) const override {
    return std::string(message_of(static_cast<condition>(value)));
  }

  [[nodiscard]] bool equivalent(const std::error_code& original, int value) const noexcept override {
    const auto code = without_asio_category(original);
    switch (static_cast<condition>(value)) {
      case condition::invalid_argument: return is_invalid_argument(code);
      case condition::peer_failed: return is_peer_failed(code);
      case condition::retryable: return is_retryable(code);
      case condition::cancelled: return is_cancelled(code);
      case condition::timed_out: return is_timed_out(code);
    }
    return false;
  }
};

constinit const NeverDestroyed<ErrorCategory> the_error_category;
constinit const NeverDestroyed<ConditionCategory> the_condition_category;

/// Asio's categories are destroyed at exit, in the reverse of the order in which they were made: made first, they are there
/// for the channels in the destructors of the program's static objects. 101 is before all that have no number.
[[gnu::constructor(101)]] void make_asio_categories() {
  (void)asio::error::get_system_category();
  (void)asio::error::get_netdb_category();
  (void)asio::error::get_addrinfo_category();
  (void)asio::error::get_misc_category();
}

}  // namespace

const std::error_category& error_category() noexcept { return the_error_category.value; }

const std::error_category& condition_category() noexcept { return the_condition_category.value; }

std::error_code make_error_code(errc code) noexcept { return {static_cast<int>(code), error_category()}; }

std::error_condition make_error_condition(condition value) noexcept {
  return {static_cast<int>(value), condition_category()};
}

}  // namespace kvferry
