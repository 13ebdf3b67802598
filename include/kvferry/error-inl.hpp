// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/error_codes.hpp>

#include <asio/error.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <string>
#include <utility>

#include <kvferry/detail/never_destroyed.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

/// A set of conditions, a bit each.
using Conditions = std::uint32_t;

constexpr Conditions only(condition value) noexcept { return Conditions{1} << static_cast<unsigned>(value); }

inline constexpr Conditions invalid = only(condition::invalid_argument);
inline constexpr Conditions failed = only(condition::peer_failed);
inline constexpr Conditions retry = only(condition::retryable);
inline constexpr Conditions ended_here = only(condition::cancelled);
inline constexpr Conditions late = only(condition::timed_out);
inline constexpr Conditions landing = only(condition::may_still_land);

struct OwnCode {
  errc code;
  std::string_view name;
  Conditions conditions;
  std::string_view message;
};

/// All of ours, in the order of their numbers. A new one goes to the end: numbers travel.
inline constexpr std::array own_codes{
    OwnCode{errc::empty_peer_id, "empty_peer_id", invalid, "the peer id is empty"},
    OwnCode{errc::unknown_peer, "unknown_peer", invalid, "no handshake with this peer has taken place"},
    OwnCode{errc::self_connection, "self_connection", invalid, "the url leads back to this channel"},
    OwnCode{errc::invalid_url, "invalid_url", invalid, "the url is neither tcp://host:port nor host:port"},
    OwnCode{errc::count_mismatch, "count_mismatch", invalid, "numbers that must be equal differ"},
    OwnCode{errc::unknown_region, "unknown_region", invalid, "there is no region of this number"},
    OwnCode{errc::index_out_of_range, "index_out_of_range", invalid,
            "the page index lies behind the last page of the region"},
    OwnCode{errc::object_too_large, "object_too_large", invalid, "the object is larger than its page"},
    OwnCode{errc::not_in_region, "not_in_region", invalid, "the buffer does not start at a page of the region"},
    OwnCode{errc::access_denied, "access_denied", invalid, "the region does not allow this access"},
    OwnCode{errc::notification_too_large, "notification_too_large", invalid, "the notification is too large"},
    OwnCode{errc::invalid_region, "invalid_region", invalid, "the regions are not valid"},
    OwnCode{errc::not_supported, "not_supported", invalid, "the transport does not support this"},
    OwnCode{errc::would_deadlock, "would_deadlock", invalid,
            "a blocking call on the thread that would have to complete it"},
    OwnCode{errc::timed_out, "timed_out", late | retry, "the deadline passed"},
    OwnCode{errc::cancelled, "cancelled", ended_here, "the operation was cancelled"},
    OwnCode{errc::closed, "closed", ended_here, "the channel is closed"},
    OwnCode{errc::peer_cancelled, "peer_cancelled", retry, "the peer timed out or cancelled its side"},
    OwnCode{errc::buffer_too_small, "buffer_too_small", invalid, "the receiver's buffer is smaller than the object"},
    OwnCode{errc::resource_limit, "resource_limit", retry, "a bounded queue is full"},
    OwnCode{errc::peer_closed, "peer_closed", failed | retry | landing, "the peer closed the connection"},
    OwnCode{errc::connection_lost, "connection_lost", failed | retry | landing, "the connection to the peer broke"},
    // The same page indexes would be the wrong ones.
    OwnCode{errc::peer_restarted, "peer_restarted", failed, "the peer restarted"},
    OwnCode{errc::handshake_failed, "handshake_failed", invalid, "the handshake failed"},
    OwnCode{errc::version_mismatch, "version_mismatch", invalid, "the peer speaks another protocol version"},
    OwnCode{errc::transport_mismatch, "transport_mismatch", invalid, "the peer uses another transport"},
    OwnCode{errc::page_size_mismatch, "page_size_mismatch", invalid, "the page sizes differ"},
    OwnCode{errc::authentication_failed, "authentication_failed", failed,
            "one of the two sides did not prove who it is"},
    OwnCode{errc::protocol_violation, "protocol_violation", failed | landing, "the peer violated the protocol"},
    OwnCode{errc::malformed_message, "malformed_message", invalid, "the side message is malformed"},
    OwnCode{errc::unhandled_side_message, "unhandled_side_message", invalid,
            "the peer has no answer to this side message"},
    OwnCode{errc::invalid_peer_id, "invalid_peer_id", invalid,
            "the peer id is too long, not UTF-8, or has control characters"},
    OwnCode{errc::memory_fault, "memory_fault", invalid,
            "the memory of an object or its page can't be read or written"},
    OwnCode{errc::identity_conflict, "identity_conflict", retry,
            "another channel is connected under this id, and lives"},
    OwnCode{errc::timed_out_in_flight, "timed_out_in_flight", late | retry | landing,
            "the deadline passed, and bytes may still be on their way"},
    OwnCode{errc::cancelled_in_flight, "cancelled_in_flight", ended_here | landing,
            "the operation was cancelled, and bytes may still be on their way"},
    OwnCode{errc::closed_in_flight, "closed_in_flight", ended_here | landing,
            "the channel is closed, and bytes may still be on their way"},
    OwnCode{errc::forked, "forked", invalid,
            "the channel was made before this process was forked; only the parent can use it"},
    OwnCode{errc::fenced, "fenced", failed, "the peer fenced its memory off before this reached it"},
    OwnCode{errc::peer_restarted_in_flight, "peer_restarted_in_flight", failed | landing,
            "the peer restarted or was replaced, and bytes may still be on their way to the one before"},
    OwnCode{errc::invalid_range, "invalid_range", invalid,
            "a range or stride makes no sense, or has another number of bytes than its object"},
    OwnCode{errc::range_out_of_bounds, "range_out_of_bounds", invalid,
            "the range reaches beyond the end of its region"},
    OwnCode{errc::checksum_mismatch, "checksum_mismatch", retry, "the object landed with other bytes than were sent"},
    OwnCode{errc::region_gone, "region_gone", invalid, "the region was removed"},
    OwnCode{errc::encryption_mismatch, "encryption_mismatch", invalid,
            "the two sides do not encrypt their data connections in the same way"},
    OwnCode{errc::no_path, "no_path", failed | retry, "no transport that is allowed reaches the peer"},
};

constexpr bool in_order() noexcept {
  for (std::size_t i = 0; i < own_codes.size(); ++i) {
    if (static_cast<std::size_t>(own_codes[i].code) != i + 1) {
      return false;
    }
  }
  return true;
}
static_assert(in_order(), "own_codes has a row for each errc, in the order of their numbers");

KVFERRY_INLINE const OwnCode* find_own(std::int64_t value) noexcept {
  return value < 1 || value > static_cast<std::int64_t>(own_codes.size())
             ? nullptr
             : &own_codes[static_cast<std::size_t>(value - 1)];
}

struct SystemCode {
  int code;
  Conditions conditions;
};

/// errno values that the kernel, ZeroMQ and libibverbs may answer with.
inline constexpr std::array system_codes{
    SystemCode{ECANCELED, ended_here},
    // A connection that nothing came from: the kernel's verdict on the peer, not a caller's deadline.
    SystemCode{ETIMEDOUT, late | failed | retry},
    SystemCode{ECONNRESET, failed | retry | landing},
    SystemCode{ECONNREFUSED, failed | retry},
    SystemCode{ECONNABORTED, failed | retry | landing},
    SystemCode{EPIPE, failed | retry | landing},
    SystemCode{ESHUTDOWN, failed | retry},
    SystemCode{ENOTCONN, failed | retry},
    SystemCode{EHOSTUNREACH, failed | retry},
    SystemCode{EHOSTDOWN, failed | retry},
    SystemCode{ENETUNREACH, failed | retry},
    SystemCode{ENETDOWN, failed | retry},
    SystemCode{ENETRESET, failed | retry},
    SystemCode{EIO, failed | retry},  // an adapter that is dead
    // Things that this host has run out of, for now.
    SystemCode{EMFILE, retry},
    SystemCode{ENFILE, retry},
    SystemCode{ENOBUFS, retry},
    SystemCode{ENOMEM, retry},
    SystemCode{ENOSPC, retry},
    SystemCode{EAGAIN, retry},
    SystemCode{EINTR, retry},
    SystemCode{EBUSY, retry},
    SystemCode{EADDRINUSE, retry},
    SystemCode{EADDRNOTAVAIL, retry},  // all ports of the range in use, or an address that is not there yet
    // Things that this program may not do, or got wrong.
    SystemCode{EINVAL, invalid},
    SystemCode{E2BIG, invalid},
    SystemCode{EFBIG, invalid},
    SystemCode{EFAULT, invalid},
    SystemCode{EMSGSIZE, invalid},
    SystemCode{EACCES, invalid},
    SystemCode{EPERM, invalid},
    SystemCode{ENOENT, invalid},  // a congestion control that there isn't
    SystemCode{ENODEV, invalid},
    SystemCode{ENOPROTOOPT, invalid},
    SystemCode{EPROTONOSUPPORT, invalid},
    SystemCode{EAFNOSUPPORT, invalid},
    SystemCode{EOPNOTSUPP, invalid},
    SystemCode{ENOSYS, invalid},
};

KVFERRY_INLINE Conditions conditions_of_errno(int value) noexcept {
  const auto* const found = std::ranges::find(system_codes, value, &SystemCode::code);
  return found == system_codes.end() ? 0 : found->conditions;
}

KVFERRY_INLINE Conditions conditions_of(const std::error_code& made) noexcept {
  const std::error_code code = of_this_copy(made);
  if (code.category() == error_category()) {
    const OwnCode* const own = find_own(code.value());
    return own == nullptr ? 0 : own->conditions;
  }
  // Asio 1.22 has a category of its own for errno values and compares them with no `std::errc`.
  if (code.category() == asio::error::get_system_category()) {
    return conditions_of_errno(code.value());
  }
  // A name that does not resolve may belong to a peer that is being rescheduled.
  static const std::array gone{std::error_code(asio::error::eof), std::error_code(asio::error::host_not_found),
                               std::error_code(asio::error::host_not_found_try_again),
                               std::error_code(asio::error::no_data), std::error_code(asio::error::no_recovery)};
  if (std::ranges::find(gone, code) != gone.end()) {
    return failed | retry | (code == asio::error::eof ? landing : 0);
  }
  if (code.category() == asio::error::get_addrinfo_category()) {
    return invalid;
  }
  const std::error_condition standard = code.default_error_condition();
  const bool is_errno = standard.category() == std::generic_category() || standard.category() == std::system_category();
  return is_errno ? conditions_of_errno(standard.value()) : 0;
}

KVFERRY_INLINE std::string_view message_of(condition value) noexcept {
  switch (value) {
    case condition::invalid_argument: return "repeating it unchanged fails again";
    case condition::peer_failed: return "the peer or the way to it is gone";
    case condition::retryable: return "the same call may succeed later";
    case condition::cancelled: return "ended from this side";
    case condition::timed_out: return "the deadline passed";
    case condition::may_still_land: return "bytes may still be on their way";
  }
  return "unknown condition";
}

class ErrorCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "kvferry"; }

  [[nodiscard]] std::string message(int value) const override {
    const OwnCode* const own = find_own(value);
    return own == nullptr ? "unknown error" : std::string(own->message);
  }

  [[nodiscard]] std::error_condition default_error_condition(int value) const noexcept override {
    switch (static_cast<errc>(value)) {
      case errc::memory_fault: return std::errc::bad_address;
      case errc::cancelled:
      case errc::cancelled_in_flight: return std::errc::operation_canceled;
      case errc::timed_out:
      case errc::timed_out_in_flight: return std::errc::timed_out;
      default: return {value, *this};
    }
  }
};

class ConditionCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "kvferry.condition"; }

  [[nodiscard]] std::string message(int value) const override {
    return std::string(message_of(static_cast<condition>(value)));
  }

  [[nodiscard]] bool equivalent(const std::error_code& code, int value) const noexcept override {
    const bool known =
        value >= static_cast<int>(condition::invalid_argument) && value <= static_cast<int>(condition::may_still_land);
    return known && (conditions_of(code) & only(static_cast<condition>(value))) != 0;
  }
};

KVFERRY_INLINE constinit const NeverDestroyed<ErrorCategory> the_error_category;
KVFERRY_INLINE constinit const NeverDestroyed<ConditionCategory> the_condition_category;

/// Asio's categories are destroyed at exit, in the reverse of the order in which they were made: made first, they are there
/// for the channels in the destructors of the program's static objects. 101 is before all that have no number.
/// Where several files define this, it runs several times, which changes nothing.
[[gnu::constructor(101)]] KVFERRY_INLINE void make_asio_categories() {
  (void)asio::error::get_system_category();
  (void)asio::error::get_netdb_category();
  (void)asio::error::get_addrinfo_category();
  (void)asio::error::get_misc_category();
}

/// A sentence that was made of another error, a peer's say, has the message already.
KVFERRY_INLINE std::string without_message(std::string what, const std::error_code& code) {
  const std::string end = ": " + code.message();
  while (what.ends_with(end)) {
    what.resize(what.size() - end.size());
  }
  return what;
}

}  // namespace internal

KVFERRY_INLINE TransferError::TransferError(std::error_code code, const std::string& what, std::size_t transferred)
    : std::system_error(code, without_message(what, code)), transferred_(transferred) {}

KVFERRY_INLINE const std::error_category& error_category() noexcept { return the_error_category.value; }

KVFERRY_INLINE const std::error_category& condition_category() noexcept { return the_condition_category.value; }

KVFERRY_INLINE std::error_code of_this_copy(const std::error_code& code) noexcept {
  if (code.category() == error_category()) {
    return code;
  }
  const std::array categories{&error_category(), &asio::error::get_system_category(), &asio::error::get_misc_category(),
                              &asio::error::get_netdb_category(), &asio::error::get_addrinfo_category()};
  const std::string_view name = code.category().name();
  const auto same = std::ranges::find_if(categories, [&](const std::error_category* own) {
    return *own == code.category() || own->name() == name;
  });
  return same == categories.end() ? code : std::error_code(code.value(), **same);
}

KVFERRY_INLINE bool detail::is_code(const std::error_code& code, errc value) noexcept {
  return code && of_this_copy(code) == make_error_code(value);
}

KVFERRY_INLINE bool is_errc(std::int64_t value) noexcept { return find_own(value) != nullptr; }

KVFERRY_INLINE std::string_view errc_name(int value) noexcept {
  const OwnCode* const own = find_own(value);
  return own == nullptr ? std::string_view() : own->name;
}

KVFERRY_INLINE std::error_code make_error_code(errc code) noexcept {
  return {static_cast<int>(code), error_category()};
}

KVFERRY_INLINE std::error_condition make_error_condition(condition value) noexcept {
  return {static_cast<int>(value), condition_category()};
}

}  // namespace kvferry
