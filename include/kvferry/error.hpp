// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_ERROR_HPP
#define KVFERRY_ERROR_HPP

#include <concepts>
#include <cstddef>
#include <string>
#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Why a call failed, as far as kvferry itself found out. errno values and Asio's codes pass through unchanged.
/// Callers that only have to decide what to do next compare with a `condition` instead.
enum class errc {
  // The call's arguments
  empty_peer_id = 1,       ///< A peer id is empty.
  unknown_peer,            ///< No handshake with this peer has taken place on this channel.
  self_connection,         ///< The url leads back to this very channel.
  invalid_url,             ///< Not `tcp://host:port`, `host:port`, or their IPv6 forms.
  count_mismatch,          ///< Numbers of objects, indexes, statuses or sizes that must be equal are not.
  unknown_region,          ///< The peer (or this channel) has no region of that number.
  index_out_of_range,      ///< A page index lies behind the region's last page.
  object_too_large,        ///< An object does not fit its page, or a page its capacity.
  not_in_region,           ///< A buffer does not start at a page of the local region.
  access_denied,           ///< The region's access does not allow what was asked.
  notification_too_large,  ///< The notification exceeds `Capabilities::max_notification_bytes`.
  invalid_region,  ///< A region is empty, has no pages, a size that is no multiple of its page size, or an access
                   ///< that there isn't; or there are too many.
  not_supported,   ///< The transport cannot do this; see `Capabilities`.
  would_deadlock,  ///< A blocking form was called on the thread that would have to complete it.

  // What became of an operation
  timed_out,         ///< The deadline passed.
  cancelled,         ///< The caller cancelled the operation.
  closed,            ///< The channel was closed.
  peer_cancelled,    ///< The other side of a send or recv timed out or was cancelled.
  buffer_too_small,  ///< An object sent did not fit the buffer posted for it by the recv.
  resource_limit,    ///< A bounded queue, here or at the peer, is full; nothing was harmed, try again.

  // What became of a peer
  peer_closed,         ///< The peer closed its connection.
  connection_lost,     ///< The connection to the peer broke, or was broken because it stalled.
  peer_restarted,      ///< The peer is a new incarnation: page indexes agreed with the old one are stale.
  handshake_failed,    ///< The peer refused the handshake or answered with something else.
  version_mismatch,    ///< The peer speaks another protocol version.
  transport_mismatch,  ///< The peer's channel uses another transport.
  page_size_mismatch,  ///< Both sides' regions of one number have pages of different sizes, and pages are named by index.
  authentication_failed,   ///< A key or a secret does not prove who is there: keyrings that do not
                           ///< fit, or a data connection that is not the peer's.
  protocol_violation,      ///< The peer sent what the protocol does not allow.
  malformed_message,       ///< A side message is not msgpack, or not of the expected shape.
  unhandled_side_message,  ///< The receiver has no answer to a side message of this type.

  // The call's arguments, once more
  invalid_peer_id,  ///< An id is longer than `max_peer_id_bytes`, not UTF-8, or has control characters.

  memory_fault,  ///< Memory of an object, or of its page at the peer, is not mapped, or not readable or writable as
                 ///< needed. Equals std::errc::bad_address.

  /// Another channel is connected under this id and lives: two have the same name, or the one that this one replaces has
  /// not gone yet.
  identity_conflict,

  // What became of a write or send that was ended from this side before the peer had dealt with it: it did not answer
  // in time, and the connection was broken. See condition::may_still_land.
  timed_out_in_flight,  ///< As timed_out, but bytes may still be on their way.
  cancelled_in_flight,  ///< As cancelled, but bytes may still be on their way.
  closed_in_flight,     ///< As closed, but bytes may still be on their way.

  // What became of this process
  forked,  ///< The channel is the parent's of this process, which was forked: only the parent can use it.

  // What became of an operation, once more
  /// The write was waiting for a connection when the peer fenced its memory off (`BaseTransferChannel::fence`), and
  /// was not made: its pages are to be agreed on anew.
  fenced,
  /// The write or send was under way to a peer whose place another one has taken: as peer_restarted, but bytes may still
  /// be on their way to the one that was the peer before.
  peer_restarted_in_flight,

  // The call's arguments, once more
  invalid_range,        ///< A range or stride makes no sense, or has another number of bytes than its object.
  range_out_of_bounds,  ///< A range reaches beyond the end of its region.

  /// An object landed with other bytes than were sent: its checksum differs (`TransferSpec::checksums`).
  checksum_mismatch,

  region_gone,          ///< The region was removed (`BaseTransferChannel::remove_region`), here or at the peer.
  encryption_mismatch,  ///< One side encrypts its data connections and the other does not, or not by certificates.
  no_path,              ///< No transport that is allowed, and that both sides offer, reaches the peer.
};

/// The conditions that a caller decides by. `ec == kvferry::condition::retryable` holds for every code, of whatever
/// category, that belongs to the condition. Every code of kvferry's own and every errno that its calls may end with is
/// in one of them at least.
enum class condition {
  /// Repeating the call unchanged fails again: an argument is wrong, a buffer can't be read or written (EFAULT), a list is too long (E2BIG), this
  /// program may not do it (EACCES, EPERM), or the two channels do not go together as they are set up: the mismatches,
  /// errc::handshake_failed (who answers is no such channel), errc::malformed_message; or the region is gone.
  invalid_argument = 1,
  /// The peer or the way to it is gone: errc::peer_closed, connection_lost, peer_restarted (in flight or not), fenced
  /// (after the peer was gone for a while), authentication_failed and protocol_violation (who is there now is no sound
  /// peer), no_path, ECONNRESET, ECONNREFUSED, ETIMEDOUT, EOF, ...
  peer_failed,
  /// The same call may succeed later: timed_out, resource_limit, peer_cancelled, identity_conflict, checksum_mismatch; what this host is
  /// out of for now (EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, ...), EINTR; and every peer_failed but
  /// errc::peer_restarted (in flight or not) and errc::fenced, after which page indexes have to be agreed anew,
  /// errc::authentication_failed, errc::protocol_violation, and RDMA's remote_access_error, after which it isn't sure
  /// that the peer offers what it did.
  retryable,
  cancelled,  ///< Ended from this side: errc::cancelled, errc::closed, in flight or not, ECANCELED.
  timed_out,  ///< errc::timed_out, in flight or not, ETIMEDOUT.
  /// Of a write or send: its connection was broken before the peer had dealt with it, so bytes of it may still land.
  /// Its pages are not to be used for something else before the peer's side has called `fence`, or a later operation of
  /// this side with the same peer has succeeded: a peer stops receiving on the old connection before it welcomes a new
  /// one. After errc::peer_restarted_in_flight only a fence counts, of the one that was the peer then, or its end: what
  /// is done with the new one says nothing of the old one's pages. errc::connection_lost, peer_closed,
  /// protocol_violation, those in flight, ECONNRESET, ECONNABORTED, EPIPE, EOF. The same codes end a write or send of
  /// which nothing had been sent, such as one that waited for a connection: where they hold, it isn't sure that
  /// something may land. A write or send that ends with any other code has left nothing under way.
  may_still_land,
};

/// The category of `errc`; its name is "kvferry".
[[nodiscard]] KVFERRY_EXPORT const std::error_category& error_category() noexcept;

/// The category of `condition`; its name is "kvferry.condition".
[[nodiscard]] KVFERRY_EXPORT const std::error_category& condition_category() noexcept;

[[nodiscard]] KVFERRY_EXPORT std::error_code make_error_code(errc code) noexcept;
[[nodiscard]] KVFERRY_EXPORT std::error_condition make_error_condition(condition value) noexcept;

namespace detail {
[[nodiscard]] KVFERRY_EXPORT bool is_code(const std::error_code& code, errc value) noexcept;
}  // namespace detail

/// Whether it is this code, whichever copy of kvferry in this process has made it: a plugin may have one of its own.
/// Of `std::error_code` alone: what converts to one, as Boost's does, may have operators of its own.
template <std::same_as<std::error_code> Code>
[[nodiscard]] bool operator==(const Code& code, errc value) noexcept {
  return detail::is_code(code, value);
}

/// The stable name of an error, for metrics, logs and tests: the enumerator of an `errc` ("timed_out"), the symbol of
/// an errno ("ECONNRESET"), Asio's name ("eof", "host_not_found"), else the number. The category is not part of it. The
/// texts of `message()` may change between versions; these names don't.
[[nodiscard]] KVFERRY_EXPORT std::string error_name(const std::error_code& code);

/// Thrown by the throwing form of every blocking call. `what()` names the peer, the field and both values.
class KVFERRY_EXPORT TransferError : public std::system_error {
 public:
  /// @param what without the code's own message, which is appended; one that ends with it already is taken as well.
  TransferError(std::error_code code, const std::string& what, std::size_t transferred = 0);

  /// How many objects of the batch were transferred all the same.
  [[nodiscard]] std::size_t transferred() const noexcept { return transferred_; }

 private:
  std::size_t transferred_;
};

}  // namespace kvferry

/// @cond
template <>
struct std::is_error_code_enum<kvferry::errc> : std::true_type {};
template <>
struct std::is_error_condition_enum<kvferry::condition> : std::true_type {};
/// @endcond

#endif  // KVFERRY_ERROR_HPP
