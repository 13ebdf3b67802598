// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_BASE_TRANSFER_CHANNEL_HPP
#define KVFERRY_BASE_TRANSFER_CHANNEL_HPP

#include <asio/any_io_executor.hpp>
#include <asio/async_result.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/channel_requests.hpp>
#include <kvferry/channel_stats.hpp>
#include <kvferry/completion.hpp>
#include <kvferry/config.hpp>
#include <kvferry/error.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/peer_event.hpp>
#include <kvferry/side_message.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Moves pages of KV caches between peers, over any transport.
///
/// A channel offers regions of memory to its peers, shakes hands with them, and moves batches of objects: one-sided
/// (write, read: only the initiator acts, the peer's page indexes or byte ranges are given) or paired (send, recv:
/// matched by peer and tag). Once either side has connected, both may start operations. LMCache: `BaseTransferChannel`.
///
/// **Objects** are buffers. An object written to (read from) page index `i` lies at
/// `[i * page_size, i * page_size + size)` of the peer's region; its size is at most the region's page size. Where
/// `TransferSpec::remote_ranges` are given instead, object i is the bytes of range i, in any region and of any size; with
/// `TransferSpec::local_strides` an object is blocks of its buffer. The bytes belong to the channel from the initiating
/// call until the completion, and not a moment longer: when an operation has ended - done, failed, timed out, cancelled
/// or closed - nothing touches its buffers any more.
///
/// Memory that is gone - unmapped, cut off a file's end, without the right to read or write - ends the operation with
/// `errc::memory_fault` over TCP, also where it is a page of the peer's region that is gone there. No other operation is
/// harmed and the connection stays. Objects that travel in one frame with the bad one (`TcpTransferChannel`: up to 1 MiB)
/// fail with it, and a notification isn't handed out. Where an adapter moves the bytes (RDMA), memory has to stay mapped
/// from the operation's start, or the channel's construction or `add_region` for regions, to its end or the return of
/// `remove_region`.
///
/// **Forms.** Each operation comes three times: blocking and throwing `TransferError`; blocking with
/// `std::error_code&`; and asynchronous, taking any Asio completion token (a callback, `use_future`, `use_awaitable`,
/// `deferred`, one bound to an executor or to a cancellation slot). A handler runs on its associated executor, or the
/// channel's where it has none; never inside the call that started the operation, and with no lock of the library's
/// held. What becomes of one that throws: `CompletionHandler`.
///
/// **Completion.** Every operation ends exactly once, by its deadline at the latest (a transport may state a short
/// grace for draining what is on the wire). The count is the number of objects that were transferred; when it is
/// smaller than the batch, the error says why and `TransferSpec::statuses` says which. A write or send is done when it
/// is in the peer's memory.
///
/// **Cancellation.** All `asio::cancellation_type`s are honoured alike: what has not started is dequeued, what has is
/// drained or its connection failed; then the operation ends with `errc::cancelled`. After a write that did not
/// succeed, the contents of its pages at the peer are unspecified.
///
/// **The end.** When a write has ended, for whatever reason, nothing of it lands at the peer afterwards, nor does its
/// notification. A write that is cancelled, timed out or closed ends only when the peer has answered for every byte that
/// was sent; if all of it has arrived by then, the write succeeds. Where the peer doesn't answer in time (each transport
/// says how long it waits), the connection is broken, and `condition::may_still_land` holds for the write's error. It may
/// hold as well for a write of which nothing was sent, when its connection or the attempt to make one failed; where it
/// does not hold, nothing of the write can land any more. Before a peer welcomes a new connection of this channel it
/// has stopped receiving on the old one. The same holds for sends. A read or recv that has ended leaves its local buffers
/// alone, whatever the peer does.
///
/// **Order.** Operations with one peer on the same bytes, started one after the other's end, take effect in that order,
/// whatever connections carry them.
///
/// **Threads.** All member functions may be called from any thread at any time, `close()` included; only construction
/// and destruction must not overlap with anything else, nor may the destructor run on a thread of the channel's own. A
/// blocking form must not be called on a thread that runs the channel's executor: where that can be noticed it fails
/// with `errc::would_deadlock`.
///
/// **Errors** that every transport reports alike: `errc::closed` after `close()`, `errc::empty_peer_id`,
/// `errc::unknown_peer` (no handshake yet), `errc::count_mismatch`, `errc::unknown_region`, `errc::region_gone` (this one
/// also for single objects, of a region that the peer removes meanwhile), `errc::access_denied`,
/// `errc::index_out_of_range`, `errc::object_too_large` (all before any I/O), `errc::timed_out`, `errc::cancelled`,
/// `errc::peer_restarted`, `errc::peer_restarted_in_flight` (the peer is a new incarnation, and the operation was started
/// before that was known: agree on page indexes anew), `errc::fenced` (likewise: the peer has called `fence` while the
/// write waited for a connection), and codes of `condition::peer_failed`. An empty batch transfers 0 objects and succeeds
/// without any traffic, unless it has a notification: then that is sent.
///
/// **Forked processes.** A channel belongs to the process that made it. In a forked child every call on it ends with
/// `errc::forked` at once, no peer is connected, `close()` does nothing, and its destructor neither waits nor talks,
/// and frees
/// no memory; what the parent does with it goes on undisturbed. Channels that the child makes itself work as any others. A
/// handler without an executor of its own runs there on a thread of the child's. The child still holds the parent's ports
/// and connections, until it ends or calls exec: while it runs, the parent's peers do not notice that the parent has ended.
///
/// **Transports.** A subclass overrides the protected `start_*` functions and the facts; the forms are written here
/// once. `kit::TransferChannelKit` does more of it: deadlines, exactly-once, peers and handshakes.
class KVFERRY_EXPORT BaseTransferChannel {
 public:
  BaseTransferChannel() = default;
  BaseTransferChannel(const BaseTransferChannel&) = delete;
  BaseTransferChannel& operator=(const BaseTransferChannel&) = delete;
  virtual ~BaseTransferChannel() = default;

  /// @name Facts
  /// @{

  /// The transport's name, as it travels in the handshake: "tcp", "rdma", ...
  [[nodiscard]] virtual std::string_view transport() const noexcept = 0;

  /// The operations that this transport supports.
  [[nodiscard]] virtual Capabilities capabilities() const noexcept = 0;

  /// The executor of handlers that have none of their own.
  [[nodiscard]] virtual asio::any_io_executor get_executor() const = 0;

  /// A copy of what this channel offers at this moment, ordered by number: the regions given at construction and those
  /// added since, without the removed ones. LMCache: `buffer_ptr`, `buffer_size`, `align_bytes`.
  [[nodiscard]] virtual std::vector<LocalRegion> regions() const = 0;

  /// Where this channel answers handshakes: the advertised address, else the bound one, each with the port that was
  /// really bound if none was given; empty without a listener.
  [[nodiscard]] virtual std::string peer_init_url() const = 0;

  /// A random number, drawn when the channel is made: tells it from a later channel with the same id. Peers find it in
  /// `PeerInfo::incarnation`, and may name it in `TransferSpec::incarnation`. 0: the transport has none.
  [[nodiscard]] virtual std::uint64_t incarnation() const noexcept { return 0; }

  /// Describes a connected peer; nothing if there is no usable connection.
  [[nodiscard]] virtual std::optional<PeerInfo> peer_info(std::string_view peer_id) const = 0;

  /// All peers with a usable connection, whichever side connected, ordered by id.
  [[nodiscard]] virtual std::vector<PeerInfo> peers() const = 0;

  /// The channel's counters since it was made. Counting is always on; a snapshot takes microseconds. May also be
  /// called after `close()`. The default, for transports that count nothing, has nothing but the transport's name.
  [[nodiscard]] virtual ChannelStats stats() const;

  /// @}
  /// @name Initialization
  /// @{

  /// Makes a peer usable: shakes hands at its init url and sets up the data path. Does nothing if the peer is usable
  /// already at this url. Then, in either case, sends the side message if there is one. LMCache:
  /// `lazy_init_peer_connection`.
  ///
  /// Two peers that call this at once for each other end with one connection. A peer that restarted is recognised, its
  /// stale connection is dropped and a new one is made.
  ///
  /// A peer that is usable under another url than this one has moved, or has two. Who answers at the new one is asked:
  /// if that is the same incarnation, nothing else happens; if it is another one, it takes the old one's place, whose
  /// operations end with `errc::peer_restarted`, or `peer_restarted_in_flight` if bytes of them may still land there.
  /// If nobody answers, the call ends with that error and the old connection stays as it was.
  ///
  /// If two channels give the same `local_id` to a peer, the later one is refused with `errc::identity_conflict` while
  /// the earlier one lives. So is one channel that knows the peer by two names at two of its addresses. The peer asks
  /// the earlier channel for a sign of life, and replaces it if it gives none within a second or its connection ends.
  /// `ChannelStats` counts such conflicts, and they are logged.
  ///
  /// @param local_id how the peer will know this channel: 1 to `max_peer_id_bytes` bytes of UTF-8 without control
  ///   characters (U+0000 to U+001F, U+007F to U+009F).
  /// @param peer_id how this channel will know the peer; likewise.
  /// @param peer_init_url `tcp://host:port` or `host:port`; IPv6 hosts in brackets.
  /// @param side_message sent to the peer's `handle_init_side_msg` after the handshake.
  /// @return the answer to the side message, if one was sent.
  /// @throws TransferError `errc::empty_peer_id`, `errc::invalid_peer_id`, `errc::invalid_url`, `errc::self_connection`,
  ///   `errc::handshake_failed`, `errc::version_mismatch`, `errc::transport_mismatch`, `errc::invalid_region`,
  ///   `errc::authentication_failed`, `errc::identity_conflict`, `errc::resource_limit`,
  ///   `errc::timed_out`, `errc::closed`, whatever the peer answered to the side message, and the network's own codes.
  std::optional<SideMessage> lazy_init_peer_connection(std::string_view local_id, std::string_view peer_id,
                                                       std::string_view peer_init_url,
                                                       std::optional<SideMessage> side_message = {},
                                                       const InitSpec& spec = {});
  /// As above, with the error in `ec`.
  std::optional<SideMessage> lazy_init_peer_connection(std::string_view local_id, std::string_view peer_id,
                                                       std::string_view peer_init_url,
                                                       std::optional<SideMessage> side_message, const InitSpec& spec,
                                                       std::error_code& ec);

  /// As above, asynchronously. Completion signature: `void(std::error_code, std::optional<SideMessage>)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::optional<SideMessage>)) CompletionToken>
  auto async_lazy_init_peer_connection(std::string_view local_id, std::string_view peer_id,
                                       std::string_view peer_init_url, std::optional<SideMessage> side_message,
                                       const InitSpec& spec, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, std::optional<SideMessage>)>(
        [this](auto&& handler, InitRequest request) {
          start_init_peer(std::move(request),
                          SideMessageCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token,
        InitRequest{std::string(local_id), std::string(peer_id), std::string(peer_init_url), std::move(side_message),
                    spec.timeout, spec.diagnostic});
  }

  /// Whether there is a usable connection to the peer, in both directions. LMCache: `remote_xfer_handler_exists`.
  [[nodiscard]] virtual bool remote_xfer_handler_exists(std::string_view peer_id) const = 0;

  /// Answers a side message; to be overridden by those who have messages of their own. LMCache: `handle_init_side_msg`.
  ///
  /// Runs on a thread that the channel keeps for side messages: it may block, and then delays other side messages, but
  /// no handshake and no transfer. An exception becomes an error message to the peer. A code of kvferry's goes along as it
  /// is; others become `errc::connection_lost` or `resource_limit`, if they are `condition::peer_failed` or `retryable`,
  /// else `errc::handshake_failed`.
  ///
  /// The default answers nothing: it throws `errc::unhandled_side_message`. `kit::TransferChannelKit` answers
  /// `P2PInitSideMsg` and `PySocketInitRequest` as LMCache does.
  virtual SideMessage handle_init_side_msg(const SideMessage& message);

  /// Sends one side message to whoever answers handshakes at `peer_init_url` - a kvferry channel, or an LMCache channel
  /// with LMCache's messages - and returns the answer. Needs no connection and makes none. LMCache:
  /// `send_init_side_msg`.
  /// @param message at most `ChannelOptions::max_handshake_bytes` when encoded, as is the answer.
  /// @throws TransferError EMSGSIZE, `errc::invalid_url`, `errc::timed_out`, `errc::closed`, `errc::malformed_message`,
  ///   and the code in the answer if that is a `SideMessageError`.
  SideMessage send_init_side_msg(std::string_view peer_init_url, SideMessage message, const InitSpec& spec = {});
  /// As above, with the error in `ec`; the result is then an empty message.
  SideMessage send_init_side_msg(std::string_view peer_init_url, SideMessage message, const InitSpec& spec,
                                 std::error_code& ec);

  /// As above, asynchronously. Completion signature: `void(std::error_code, std::optional<SideMessage>)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::optional<SideMessage>)) CompletionToken>
  auto async_send_init_side_msg(std::string_view peer_init_url, SideMessage message, const InitSpec& spec,
                                CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, std::optional<SideMessage>)>(
        [this](auto&& handler, InitRequest request) {
          start_side_message(std::move(request),
                             SideMessageCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, InitRequest{{}, {}, std::string(peer_init_url), std::move(message), spec.timeout, spec.diagnostic});
  }

  /// @}
  /// @name Connecting by the program's own control plane
  /// One side's metadata travels over the program's control plane, and the other side connects with it.
  /// @{

  /// Makes the metadata that another channel's `connect` takes to connect to this one: the id under which it is to know
  /// this channel, this incarnation, and the url that answers handshakes. The bytes are opaque, below 1 KiB, and no
  /// secret. They are of use until this channel is closed.
  /// @param local_id as for `lazy_init_peer_connection`.
  /// @throws TransferError `errc::empty_peer_id`, `errc::invalid_peer_id`, `errc::not_supported` (also where this channel
  ///   answers no handshakes, or at a wildcard address and was told no `ChannelOptions::advertised_init_url`),
  ///   `errc::forked`.
  [[nodiscard]] virtual std::vector<std::byte> local_metadata(std::string_view local_id) const = 0;

  /// Connects to the channel whose `local_metadata` this is, as `lazy_init_peer_connection` does with its id and url, and
  /// only to that very incarnation. Metadata is trusted no more than any url: it says whom to ask.
  /// @param local_id how the peer will know this channel.
  /// @param metadata copied by the call.
  /// @return the peer; its id is the one in the metadata.
  /// @throws TransferError `errc::malformed_message` if these bytes are no metadata, `errc::version_mismatch` or
  ///   `errc::transport_mismatch` if they are of another kind of channel, `errc::peer_restarted` if another incarnation
  ///   answers: then the metadata is out of date; nothing was connected, unless the peer changed meanwhile.
  ///   `errc::connection_lost` if the connection broke as soon as it was made. And those of `lazy_init_peer_connection`.
  PeerInfo connect(std::string_view local_id, ConstBuffer metadata, const InitSpec& spec = {});
  /// As above, with the error in `ec`.
  PeerInfo connect(std::string_view local_id, ConstBuffer metadata, const InitSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, PeerInfo)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, PeerInfo)) CompletionToken>
  auto async_connect(std::string_view local_id, ConstBuffer metadata, const InitSpec& spec, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, PeerInfo)>(
        [this](auto&& handler, ConnectRequest request) {
          start_connect(std::move(request),
                        ConnectCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token,
        ConnectRequest{std::string(local_id), {metadata.begin(), metadata.end()}, spec.timeout, spec.diagnostic});
  }

  /// @}
  /// @name Peers that come and go
  /// @{

  /// Ends the connection to a peer. Its operations end with `errc::cancelled` (`cancelled_in_flight` where the peer did
  /// not answer for them in time), and so do connects to it that are under way. When this has ended, nothing of the
  /// peer's lands here any more, and nothing of this side's there, unless an operation's error says otherwise. The
  /// peer's operations with this channel end with `errc::peer_closed`, as after `close`.
  ///
  /// A later operation with the peer connects anew, where its init url is known (else it ends with `errc::unknown_peer`);
  /// the peer may connect anew itself at any time. A peer that isn't connected is no error.
  ///
  /// Its notifications that wait here with a key for which no call waits are dropped: take what is still of use first.
  ///
  /// Takes as long as cancelling its operations does; those that are started meanwhile are not waited for. Cancelling the
  /// call ends only the wait.
  /// @throws TransferError `errc::empty_peer_id`, `errc::unknown_peer`, `errc::closed`, `errc::cancelled`,
  ///   `errc::would_deadlock`.
  void disconnect(std::string_view peer_id);
  /// As above, with the error in `ec`.
  void disconnect(std::string_view peer_id, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code)) CompletionToken>
  auto async_disconnect(std::string_view peer_id, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code)>(
        [this](auto&& handler, std::string id) {
          start_disconnect(std::move(id),
                           DisconnectCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, std::string(peer_id));
  }

  /// Hands out the next event of any peer, whichever side connected: oldest first, each once. Events that nobody has
  /// asked for yet wait in a queue of bounded length, from the channel's construction on.
  /// @param timeout unset: waits until there is an event or the channel is closed.
  /// @throws TransferError `errc::timed_out`, `errc::closed`, `errc::cancelled`, `errc::would_deadlock`.
  PeerEvent wait_peer_event(std::optional<std::chrono::milliseconds> timeout = {});
  /// As above, with the error in `ec`.
  PeerEvent wait_peer_event(std::optional<std::chrono::milliseconds> timeout, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, PeerEvent)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, PeerEvent)) CompletionToken>
  auto async_wait_peer_event(std::optional<std::chrono::milliseconds> timeout, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, PeerEvent)>(
        [this](auto&& handler, std::optional<std::chrono::milliseconds> limit) {
          start_wait_peer_event(limit, PeerEventCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, timeout);
  }

  /// @}
  /// @name Utility
  /// @{

  /// The page index of each object in a local region. LMCache: `get_local_mem_indices`.
  /// @throws TransferError `errc::unknown_region`, there is none of this number now; `errc::not_in_region` if an object does not start at a page of the
  ///   region or does not fit in it.
  [[nodiscard]] std::vector<std::uint64_t> get_local_mem_indices(const ConstObjects& objects,
                                                                 std::uint32_t region = 0) const;

  /// @}
  /// @name Paired operations
  /// @{

  /// Sends objects to the peer's recv with the same tag; the sender's n-th send of a tag meets the receiver's n-th recv
  /// of it, not counting those that were cancelled or timed out: a send whose recv is gone goes to the next one. Object
  /// i meets buffer i. Both batches must have the same number of objects (else both end with `errc::count_mismatch`), at
  /// most 2^20 (else E2BIG).
  /// An object that is larger than its buffer isn't transferred, both sides report `errc::buffer_too_small` for it, and
  /// the others arrive. LMCache: `batched_send`.
  /// @return the number of objects that are in the peer's buffers.
  /// @throws TransferError with the number of objects that are there all the same.
  std::size_t batched_send(ConstObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_send(ConstObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_send(ConstObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::send, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// Receives objects from the peer's send with the same tag; see `batched_send`. `TransferSpec::sizes` tells how many
  /// bytes each object had. LMCache: `batched_recv`.
  std::size_t batched_recv(MutableObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_recv(MutableObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_recv(MutableObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::recv, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// @}
  /// @name One-sided operations
  /// @{

  /// Writes objects into pages, or byte ranges, of the peer's regions. Done when they are in the peer's memory; the
  /// notification, if there is one, is handed to the peer only after that, whether or not this side calls again. LMCache:
  /// `batched_write`.
  ///
  /// If a batch names a page more than once, the page ends with the last one's bytes. (Where one object is shorter than
  /// another, the bytes behind it are the earlier one's.) So do ranges that overlap.
  std::size_t batched_write(ConstObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_write(ConstObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_write(ConstObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::write, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// Reads pages, or byte ranges, of the peer's regions into buffers, each filled whole (with a stride: its blocks).
  /// Where buffers of one batch overlap, the last one's bytes are there in the end.
  ///
  /// A notification is sent to the peer when the whole batch is in the buffers, for it to free its pages, say; the read
  /// then ends when the peer's queue has it. A read that fails, of whatever object, gives none; one whose notification is
  /// refused (`errc::resource_limit`), or not answered in time, has all its objects all the same. Where
  /// `condition::may_still_land` holds for a read's error, it is the notification that may still be handed out. LMCache:
  /// `batched_read`.
  std::size_t batched_read(MutableObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_read(MutableObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_read(MutableObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::read, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// Any of the four, as a value: for decorators and for those who choose the transfer at run time.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_transfer(TransferRequest request, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, std::size_t)>(
        [this](auto&& handler, TransferRequest started) {
          start_transfer(std::move(started), Completion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, std::move(request));
  }

  /// @}
  /// @name Notifications
  /// A notification goes with a write or read (`TransferSpec::notification`), or alone. One without a key is for
  /// `receive_notification`, one with a key for `receive_notifications` of that key, and for no other call.
  /// @{

  /// Sends a notification alone: a write of no objects. Ends when the peer's queue has it; the order of two that are under
  /// way at once is open.
  /// @param payload 1 to `Capabilities::max_notification_bytes` bytes; copied by the call.
  /// @throws TransferError `errc::resource_limit` if the peer's queue is full: it wasn't taken; `errc::not_supported`,
  ///   EINVAL (no bytes), `errc::notification_too_large`, and those of a write. Where
  ///   `condition::may_still_land` holds, the peer may have it or get it still.
  void notify(std::string_view peer_id, ConstBuffer payload, const NotifySpec& spec = {});
  /// As above, with the error in `ec`.
  void notify(std::string_view peer_id, ConstBuffer payload, const NotifySpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code)) CompletionToken>
  auto async_notify(std::string_view peer_id, ConstBuffer payload, const NotifySpec& spec, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code)>(
        [this](auto&& handler, TransferRequest request) {
          start_notify(std::move(request), NotifyCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, make_notification(peer_id, payload, spec));
  }

  /// The next notification without a key: oldest first, each handed out once.
  /// @param timeout unset: waits until there is one or the channel is closed.
  /// @throws TransferError `errc::timed_out`, `errc::closed`, `errc::would_deadlock`.
  Notification receive_notification(std::optional<std::chrono::milliseconds> timeout = {});
  /// As above, with the error in `ec`.
  Notification receive_notification(std::optional<std::chrono::milliseconds> timeout, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, Notification)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, Notification)) CompletionToken>
  auto async_receive_notification(std::optional<std::chrono::milliseconds> timeout, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, Notification)>(
        [this](auto&& handler, std::optional<std::chrono::milliseconds> limit) {
          start_receive_notification(limit,
                                     NotificationCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, timeout);
  }

  /// The next `count` notifications of a key, from whatever peers, oldest first: one wait for all parts of a request. Calls
  /// for the same key are served one after the other: the first gets the first `count`.
  ///
  /// At the timeout it hands out those that have come, with `errc::timed_out` (the throwing form: `std::vector` of fewer
  /// than `count`, no exception). After a cancellation they stay where they are.
  /// @param count at most `ChannelOptions::max_pending_notifications`; 0: ends at once with none. What waits for the rest
  ///   takes its room in the queue of notifications, and is bounded in number and bytes as that is.
  /// @param timeout unset: waits until all have come or the channel is closed.
  /// @throws TransferError `errc::closed`, `errc::cancelled`, `errc::would_deadlock`, E2BIG (`count` is more than the
  ///   queue holds).
  std::vector<Notification> receive_notifications(std::uint64_t key, std::size_t count,
                                                  std::optional<std::chrono::milliseconds> timeout = {});
  /// As above, with the error in `ec`.
  std::vector<Notification> receive_notifications(std::uint64_t key, std::size_t count,
                                                  std::optional<std::chrono::milliseconds> timeout,
                                                  std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::vector<Notification>)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::vector<Notification>)) CompletionToken>
  auto async_receive_notifications(std::uint64_t key, std::size_t count,
                                   std::optional<std::chrono::milliseconds> timeout, CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code, std::vector<Notification>)>(
        [this](auto&& handler, NotificationsRequest request) {
          start_receive_notifications(
              request, NotificationsCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, NotificationsRequest{key, count, timeout});
  }

  /// @}
  /// @name Fencing
  /// @{

  /// Returns when the writes that a peer has started so far can no longer change this channel's regions: they have
  /// ended, or their connection is shut, or they wait for a connection and will be refused when it is there. Call it
  /// before you use memory for something else that a peer was told to write to, above all after a failure:
  /// docs/guide.md has the recipe.
  ///
  /// A connected peer is asked, and answers when the writes that it had started have ended. If it doesn't answer in
  /// time, its connection is broken, which is just as safe. If the peer's connection has failed or was replaced, the
  /// rest of it is shut. A write that waits at the peer for a new connection ends there with `errc::fenced` when the
  /// connection is made. The fence waits a second at most for a connection that is just being made, and then gives it
  /// up.
  /// Returns at once for a peer that this channel doesn't know. What the peer starts later, also over a new
  /// connection, is not held up; where the new connection's handshake takes long, what was started meanwhile may be
  /// refused with the rest.
  ///
  /// @param timeout how long the peer may take; unset: the channel's default.
  /// @throws TransferError `errc::empty_peer_id`, `errc::closed`, `errc::cancelled`, `errc::would_deadlock`. A
  ///   cancellation ends only the wait: the peer's older writes may still come in, and those that wait at the peer for a
  ///   new connection end there with `errc::fenced` all the same.
  void fence(std::string_view peer_id, std::optional<std::chrono::milliseconds> timeout = {});
  /// As above, with the error in `ec`.
  void fence(std::string_view peer_id, std::optional<std::chrono::milliseconds> timeout, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code)) CompletionToken>
  auto async_fence(std::string_view peer_id, std::optional<std::chrono::milliseconds> timeout,
                   CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code)>(
        [this](auto&& handler, std::string id, std::optional<std::chrono::milliseconds> limit) {
          start_fence(std::move(id), limit, FenceCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, std::string(peer_id), timeout);
  }

  /// @}
  /// @name Regions that come and go
  /// For memory that is allocated after the channel is made, or freed before the channel is closed. Needs
  /// `Capabilities::region_changes`.
  /// @{

  /// Offers one more region to all peers, connected now or later.
  ///
  /// Each connected peer is told at once, on every connection to it, ahead of all that this channel starts later. So a
  /// peer that gets the number by a notification, or by anything else over these connections, can use the region. A
  /// number that comes another way - by a side message, a control plane - may overtake the news. The peer then asks
  /// this side, and its operation goes on with the answer.
  ///
  /// A channel has at most 1,024 regions at a time, those that are being removed included, and 2^31 in its life.
  /// @param region as for the constructor; registered by the call, which takes as long as that does, and does not wait for
  ///   any peer.
  /// @return the region's number: the next one that has never been given on this channel.
  /// @throws TransferError `errc::invalid_region`, `errc::not_supported` (also memory that this transport can't use),
  ///   `errc::resource_limit` (too many regions), `errc::closed`, and the errno of a registration that failed. Then there is
  ///   no region, and nobody has heard of one.
  std::uint32_t add_region(const MemoryRegion& region);
  /// As above, with the error in `ec`; the result is then 0.
  std::uint32_t add_region(const MemoryRegion& region, std::error_code& ec);

  /// Takes a region back. Returns when nothing of this channel's or of its peers' can touch its memory any more: it may be
  /// unmapped then. Other regions, and who uses them, are not held up.
  ///
  /// From the call on, the peers' new accesses end with `errc::region_gone`. An operation that was under way gets this
  /// error for the objects that came too late, and for objects in one frame with them. Bytes on their way are let
  /// through. The peer is asked on each connection to say that nothing is left. A connection on which it doesn't say so
  /// in time is broken, which is just as safe. The call also waits for this channel's own operations with objects in
  /// the region. It ends those that take too long with `errc::cancelled` (`cancelled_in_flight`), and may then exceed
  /// `timeout` by the time that a connection has to drain them.
  ///
  /// Memory that lies in another region as well is still open to peers there. Where peers copy out of this process's
  /// memory themselves (shm), one whose connection was broken may still read what lies at the addresses, for an operation
  /// that then fails: unmap the memory, or put nothing there that it must not see.
  ///
  /// Operations that are started later and have objects in that memory treat it as any other.
  ///
  /// The number stays taken. A second call for it while the first is under way waits with it, for its own time.
  /// @param timeout how long the peers and the operations may take; unset: the channel's default.
  /// @throws TransferError `errc::unknown_region` (there never was one), `errc::region_gone` (it was removed before),
  ///   `errc::not_supported`, `errc::closed`, `errc::cancelled`, `errc::would_deadlock`,
  ///   `std::errc::not_enough_memory`. A cancellation ends only the wait: the region is gone for peers, its memory may
  ///   still be in use until its time is over, and another call waits for that. So it is where memory is used up.
  void remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout = {});
  /// As above, with the error in `ec`.
  void remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code)) CompletionToken>
  auto async_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                           CompletionToken&& token) {
    return asio::async_initiate<CompletionToken, void(std::error_code)>(
        [this](auto&& handler, std::uint32_t removed, std::optional<std::chrono::milliseconds> limit) {
          start_remove_region(removed, limit,
                              RemoveRegionCompletion(std::forward<decltype(handler)>(handler), get_executor()));
        },
        token, number, timeout);
  }

  /// @}

  /// Ends everything: refuses new calls, completes pending ones with `errc::closed`, wakes all blocked threads, and
  /// drops all connections. The peer has as much time to answer for a write or send as after a cancellation; without an
  /// answer the operation ends with `errc::closed_in_flight`. Within the same time this side sends the answers that it
  /// owes. When `close` returns, no buffer and no region is touched any more; handlers may still be on their way to
  /// their executors. Waits for a `handle_init_side_msg` that is running, unless called there. Idempotent; may be
  /// called from a handler. LMCache: `close`.
  virtual void close() = 0;

  /// Copies what a spec and its objects describe into a request.
  [[nodiscard]] static TransferRequest make_request(TransferKind kind, ConstObjects objects, const TransferSpec& spec);
  [[nodiscard]] static TransferRequest make_request(TransferKind kind, MutableObjects objects,
                                                    const TransferSpec& spec);
  /// A write of no objects that has a notification.
  [[nodiscard]] static TransferRequest make_notification(std::string_view peer_id, ConstBuffer payload,
                                                         const NotifySpec& spec);

 protected:
  /// @name What a transport implements
  /// None of these may call the completion inside the call (`CompletionHandler` sees to that: it posts).
  /// @{

  /// Starts a transfer and ends it exactly once, whatever happens. Must not block.
  virtual void start_transfer(TransferRequest request, Completion completion) = 0;
  /// Starts a handshake.
  virtual void start_init_peer(InitRequest request, SideMessageCompletion completion) = 0;
  /// Starts the exchange of one side message; `local_id` and `peer_id` are empty.
  virtual void start_side_message(InitRequest request, SideMessageCompletion completion) = 0;
  /// Starts the wait for a notification.
  virtual void start_receive_notification(std::optional<std::chrono::milliseconds> timeout,
                                          NotificationCompletion completion) = 0;
  /// Starts the wait for several notifications of a key.
  virtual void start_receive_notifications(NotificationsRequest request, NotificationsCompletion completion) = 0;
  /// Starts a connect by metadata.
  virtual void start_connect(ConnectRequest request, ConnectCompletion completion) = 0;
  /// Starts a disconnect.
  virtual void start_disconnect(std::string peer_id, DisconnectCompletion completion) = 0;
  /// Starts the wait for news of a peer.
  virtual void start_wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                                     PeerEventCompletion completion) = 0;
  /// Starts a fence.
  virtual void start_fence(std::string peer_id, std::optional<std::chrono::milliseconds> timeout,
                           FenceCompletion completion) = 0;
  /// Adds a region, on the caller's thread. The default has none of this: `errc::not_supported`.
  /// @throws TransferError as `add_region`.
  virtual std::uint32_t run_add_region(const MemoryRegion& region);
  /// Starts the removal of a region. The default has none of this: `errc::not_supported`.
  virtual void start_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                                   RemoveRegionCompletion completion);

  /// A transfer on the caller's thread. The default waits for `start_transfer`; a transport that can post and poll on
  /// the caller's thread overrides it.
  virtual std::size_t run_transfer(TransferRequest request, std::error_code& ec);

  /// Whether the calling thread is one that completes operations, so that blocking it would block for ever.
  [[nodiscard]] virtual bool running_in_io_thread() const noexcept { return false; }
  /// @}

 private:
  std::size_t transfer_or_throw(TransferRequest request);
  void start_notify(TransferRequest request, NotifyCompletion completion);
};

}  // namespace kvferry

#endif  // KVFERRY_BASE_TRANSFER_CHANNEL_HPP
