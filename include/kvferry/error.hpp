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

/// The reasons that kvferry itself finds for a call's failure. errno values and Asio's codes pass through unchanged. To
/// decide what to do next, compare with a `condition` instead.
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
  access_denied,           ///< The region's access does not allow the operation.
  notification_too_large,  ///< The notification exceeds `Capabilities::max_notification_bytes`.
  invalid_region,  ///< A region is empty, has no pages, a size that is no multiple of its page size, or an invalid
                   ///< access; or there are too many regions.
  not_supported,   ///< The transport cannot do this; see `Capabilities`.
  would_deadlock,  ///< A blocking form was called on the thread that would have to complete it.

  // How an operation ended
  timed_out,         ///< The deadline passed.
  cancelled,         ///< The caller cancelled the operation.
  closed,            ///< The channel was closed.
  peer_cancelled,    ///< The other side of a send or recv timed out or was cancelled.
  buffer_too_small,  ///< An object sent did not fit the buffer posted for it by the recv.
  resource_limit,    ///< A bounded queue, here or at the peer, is full; nothing was harmed, try again.

  // How a peer or its connection failed
  peer_closed,         ///< The peer closed its connection.
  connection_lost,     ///< The connection to the peer broke, or was broken because it stalled.
  peer_restarted,      ///< The peer is a new incarnation: page indexes agreed with the old one are stale.
  handshake_failed,    ///< The peer refused the handshake or answered with something else.
  version_mismatch,    ///< The peer speaks another protocol version.
  transport_mismatch,  ///< The peer's channel uses another transport.
  page_size_mismatch,  ///< Both sides' regions of one number have pages of different sizes, and pages are named by index.
  authentication_failed,   ///< A key or a secret does not prove who the peer is: the keyrings don't match, or a data
                           ///< connection is not the peer's.
  protocol_violation,      ///< The peer sent bytes that the protocol does not allow.
  malformed_message,       ///< A side message is not msgpack, or not of the expected shape.
  unhandled_side_message,  ///< The receiver has no answer to a side message of this type.

  // The call's arguments, once more
  invalid_peer_id,  ///< An id is longer than `max_peer_id_bytes`, not UTF-8, or has control characters.

  memory_fault,  ///< Memory of an object, or of its page at the peer, is not mapped, or not readable or writable as
                 ///< needed. Equals std::errc::bad_address.

  /// Another channel is connected under this id and lives: two channels have the same id, or this channel replaces one
  /// that has not gone yet.
  identity_conflict,

  // This side ended a write or send, the peer did not answer for it in time, and the connection was broken.
  // See condition::may_still_land.
  timed_out_in_flight,  ///< As timed_out, but bytes may still be on their way.
  cancelled_in_flight,  ///< As cancelled, but bytes may still be on their way.
  closed_in_flight,     ///< As closed, but bytes may still be on their way.

  // The process
  forked,  ///< This process is a forked child and the channel is its parent's: only the parent can use it.

  // How an operation ended, once more
  /// The write was waiting for a connection when the peer called `BaseTransferChannel::fence`, and was not made. Agree
  /// on its pages anew.
  fenced,
  /// Another incarnation took the peer's place while the write or send was under way: as peer_restarted, but bytes may
  /// still be on their way to the former peer.
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

/// Groups of errors, to decide by. `ec == kvferry::condition::retryable` holds for every code, of any category, that
/// belongs to the condition. Every code of kvferry's own, and every errno with which its calls may end, belongs to at
/// least one condition.
enum class condition {
  /// Repeating the call unchanged fails again: an argument is wrong, a buffer can't be read or written (EFAULT), a list
  /// is too long (E2BIG), the program lacks the permission (EACCES, EPERM), the region is gone, or the two channels
  /// don't fit together as they are set up: the mismatches, errc::handshake_failed (no such channel answers),
  /// errc::malformed_message.
  invalid_argument = 1,
  /// The peer or the way to it is gone: errc::peer_closed, connection_lost, peer_restarted (in flight or not), fenced
  /// (after the peer was gone for a while), authentication_failed and protocol_violation (no sound peer answers),
  /// no_path, ECONNRESET, ECONNREFUSED, ETIMEDOUT, EOF, ...
  peer_failed,
  /// The same call may succeed later: timed_out, resource_limit, peer_cancelled, identity_conflict, checksum_mismatch;
  /// a resource that this host lacks for now (EMFILE, ENFILE, ENOBUFS, ENOMEM, EADDRNOTAVAIL, ...); EINTR; and every
  /// peer_failed with a few exceptions. After errc::peer_restarted (in flight or not) and errc::fenced, page indexes
  /// have to be agreed anew. The other exceptions are errc::authentication_failed, errc::protocol_violation, and RDMA's
  /// wc_status errors of a broken agreement (rdma_error.hpp), such as remote_access_error: the peer may no longer offer
  /// the same memory.
  retryable,
  cancelled,  ///< This side ended it: errc::cancelled, errc::closed, in flight or not, ECANCELED.
  timed_out,  ///< errc::timed_out, in flight or not, ETIMEDOUT.
  /// For a write or send: its connection was broken before the peer had dealt with it, so bytes of it may still land.
  /// Don't reuse its pages before the peer has called `fence`, or a later operation of this side with the same peer has
  /// succeeded. (A peer stops receiving on the old connection before it accepts a new one.) After
  /// errc::peer_restarted_in_flight, only a fence at the former peer, or its end, counts; operations with the new peer
  /// prove nothing about the old one's pages. The codes: errc::connection_lost, peer_closed, protocol_violation, those
  /// in flight, ECONNRESET, ECONNABORTED, EPIPE, EOF, and RDMA's `wc_status` errors other than the peer adapter's
  /// refusals. They also end a write or send of which nothing was sent, such as one that waited for a connection: they
  /// mean that bytes may land, not that some will. A write or send that ends with any other code has left nothing under
  /// way.
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

/// Whether it is this code, from any copy of kvferry in this process: a plugin may have a copy of its own. Takes only
/// `std::error_code` itself: types that convert to it, such as Boost's, may have operators of their own.
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
  /// @param what the sentence, to which the code's own message is appended unless it ends with it already.
  TransferError(std::error_code code, const std::string& what, std::size_t transferred = 0);

  /// How many objects of the batch were transferred in spite of the error.
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
