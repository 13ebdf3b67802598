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

// A long file: it is one class, and half of it is the class's reference.

/// Moves pages of KV caches between peers, over any transport.
///
/// A channel offers regions of memory to its peers, shakes hands with them, and moves batches of objects. An operation
/// is one-sided (write, read) or paired (send, recv). In a one-sided operation only the initiator acts, and names the
/// peer's pages or byte ranges. A send and a recv are matched by peer and tag. Once either side has connected, both may
/// start operations. LMCache: `BaseTransferChannel`.
///
/// **Objects** are buffers. An object written to (read from) page index `i` lies at
/// `[i * page_size, i * page_size + size)` of the peer's region; its size is at most the region's page size. With
/// `TransferSpec::remote_ranges` instead of indexes, object i is the bytes of range i, in any region and of any size.
/// With `TransferSpec::local_strides` an object consists of blocks of its buffer. The buffers belong to the channel
/// from the initiating call until the completion. When an operation has ended - done, failed, timed out, cancelled or
/// closed - nothing touches its buffers any more.
///
/// Over TCP, an operation ends with `errc::memory_fault` if its memory, or a page of it at the peer, is gone: unmapped,
/// cut off a file's end, or without the right to read or write. Other operations and the connection are not affected.
/// Objects that travel in one frame with the bad one (`TcpTransferChannel`: up to 1 MiB) fail with it, and a
/// notification isn't handed out. Over RDMA, where an adapter moves the bytes, memory has to stay mapped. Objects stay
/// mapped from the operation's start to its end. A region stays mapped from the channel's construction or `add_region`
/// until the channel is closed or `remove_region` returns.
///
/// **Forms.** Each operation has three forms. One blocks and throws `TransferError`; one blocks and takes a
/// `std::error_code&`; one is asynchronous and takes any Asio completion token (a callback, `use_future`,
/// `use_awaitable`, `deferred`, one bound to an executor or to a cancellation slot). A handler runs on its associated
/// executor, or on the channel's if it has none. It never runs inside the call that started the operation, and the
/// library holds no lock while it runs. `CompletionHandler` describes a handler that throws.
///
/// **Completion.** Every operation ends exactly once, by its deadline at the latest. (A transport may document a short
/// extra time for draining the bytes on the wire.) The count is the number of objects that were transferred. When it is
/// smaller than the batch, the error gives the reason and `TransferSpec::statuses` the objects that failed. A write or
/// send is done when its objects are in the peer's memory.
///
/// **Cancellation.** All `asio::cancellation_type`s have the same effect. An operation that hasn't started is dequeued;
/// one that has is drained, or its connection is broken. Then it ends with `errc::cancelled`. After a write that did
/// not succeed, the contents of its pages at the peer are unspecified. An attempt to connect ends when all that waited for
/// it have been cancelled or have timed out. A connection that is there already stays, and so does an attempt of the peer's own.
///
/// **The end.** When a write has ended, for whatever reason, no byte of it lands at the peer afterwards, and its
/// notification isn't handed out. One exception: the write's error belongs to `condition::may_still_land`. A write that
/// is cancelled, timed out or closed ends only when the peer has answered for every byte that was sent. If all bytes
/// have arrived by then, the write succeeds. If the peer doesn't answer in time (each transport documents how long it
/// waits), the connection is broken, and the write's error belongs to `condition::may_still_land`. So may the error of
/// a write of which nothing was sent, if its connection, or the attempt to make one, failed. Before a peer accepts a
/// new connection of this channel it stops receiving on the old one. The same holds for sends. A read or recv that has
/// ended never touches its local buffers again.
///
/// **Order.** If an operation starts after another one with the same peer has ended, it takes effect after that one,
/// also on the same bytes and over other connections. (`RdmaTransferChannel` has an exception with several rails.)
///
/// **Threads.** All member functions, `close()` included, may be called from any thread at any time. Only construction
/// and destruction must not overlap with other calls, and the destructor must not run on one of the channel's own
/// threads. Don't call a blocking form on a thread that runs the channel's executor: it fails with
/// `errc::would_deadlock` where kvferry can notice it, and hangs elsewhere. In a log sink, call no channel (`LogSink`).
///
/// **Errors.** All transports report these alike. Before any I/O: `errc::closed` after `close()`,
/// `errc::empty_peer_id`, `errc::unknown_peer` (no handshake yet), `errc::count_mismatch`, `errc::unknown_region`,
/// `errc::region_gone`, `errc::access_denied`, `errc::index_out_of_range`, `errc::object_too_large`. Later:
/// `errc::timed_out`, `errc::cancelled`, `errc::region_gone` for single objects if the peer removes the region
/// meanwhile, `errc::peer_restarted` and `errc::peer_restarted_in_flight`, `errc::fenced`, and codes of
/// `condition::peer_failed`. After `peer_restarted`, `peer_restarted_in_flight` and `fenced`, agree on page indexes
/// anew: the peer is a new incarnation and the operation was started before that was known, or the peer has called
/// `fence` while the write waited for a connection.
///
/// An empty batch transfers 0 objects and succeeds without any traffic. If it has a notification, that is sent.
///
/// **Forked processes.** A channel belongs to the process that made it. In a forked child every call on it ends with
/// `errc::forked` at once, no peer is connected, and `close()` does nothing. Its destructor doesn't wait, sends nothing
/// and frees no memory. The parent's use of the channel is not disturbed. A channel that the child makes itself works
/// as usual. In the child, a handler without an executor of its own runs on a thread of the child. The child holds the
/// parent's ports and connections until it ends or calls exec. While it runs, the parent's peers do not notice that the
/// parent has ended.
///
/// **Transports.** A subclass overrides the protected `start_*` functions and the functions under "Facts". This class
/// implements the three forms on top of them. `kit::TransferChannelKit` implements more: deadlines, ends exactly once,
/// peers and handshakes.
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

  /// The regions that this channel offers now, ordered by number: those given at construction and those added since,
  /// without the removed ones. The result is a copy. LMCache: `buffer_ptr`, `buffer_size`, `align_bytes`.
  [[nodiscard]] virtual std::vector<LocalRegion> regions() const = 0;

  /// The url at which this channel answers handshakes: the advertised address, or else the bound one. If the options
  /// gave port 0, the url has the port that was bound. Empty without a listener.
  [[nodiscard]] virtual std::string peer_init_url() const = 0;

  /// A random number that is drawn when the channel is made. It tells the channel from a later one with the same id.
  /// Peers find it in `PeerInfo::incarnation`, and may name it in `TransferSpec::incarnation`. 0: the transport has
  /// none.
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

  /// Makes a peer usable: shakes hands at its init url and sets up the data path. If the peer is usable already at this
  /// url, it skips that. In either case it then sends the side message, if there is one. LMCache:
  /// `lazy_init_peer_connection`.
  ///
  /// Two peers that call this at once for each other end with one connection. A peer that restarted is recognised, its
  /// stale connection is dropped and a new one is made.
  ///
  /// A peer that is usable under another url than this one has moved, or has two urls. The call then asks at the new
  /// url. If the same incarnation answers, nothing else happens. If another one answers, it takes the old one's place,
  /// and operations with the old one end with `errc::peer_restarted`, or with `peer_restarted_in_flight` if bytes of
  /// them may still land there. If nobody answers, the call ends with that error and the old connection stays.
  ///
  /// If two channels give the same `local_id` to a peer, the peer refuses the later one with `errc::identity_conflict`
  /// while the earlier one lives. It also refuses a channel that knows the peer by two names at two of its addresses.
  /// To find out, the peer probes the earlier channel. If that doesn't answer within a second, or its connection ends,
  /// the later channel takes its place. `ChannelStats` counts such conflicts, and they are logged.
  ///
  /// @param local_id the id by which the peer will know this channel: 1 to `max_peer_id_bytes` bytes of UTF-8 without
  ///   control characters (U+0000 to U+001F, U+007F to U+009F). A connected peer is told no second one: `disconnect` first.
  /// @param peer_id the id by which this channel will know the peer; likewise.
  /// @param peer_init_url `tcp://host:port` or `host:port`; IPv6 hosts in brackets.
  /// @param side_message sent to the peer's `handle_init_side_msg` after the handshake.
  /// @return the answer to the side message, if one was sent.
  /// @throws TransferError `errc::empty_peer_id`, `errc::invalid_peer_id`, `errc::invalid_url`, `errc::self_connection`,
  ///   `errc::handshake_failed`, `errc::version_mismatch`, `errc::transport_mismatch`, `errc::invalid_region`,
  ///   `errc::authentication_failed`, `errc::identity_conflict`, `errc::resource_limit`,
  ///   `errc::timed_out`, `errc::closed`, the error with which the peer answered the side message, EINVAL (the connected
  ///   peer knows this channel by another id), and the network's own codes.
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

  /// Answers a side message. Override it to handle messages of your own. LMCache: `handle_init_side_msg`.
  ///
  /// Runs on a thread that the channel keeps for side messages. It may block, and then delays other side messages, but
  /// no handshake and no transfer. A handler that waits for an answer of this very channel waits in vain: a blocking
  /// `send_init_side_msg` to the channel's own url ends with `errc::would_deadlock` at once, but a message to another
  /// address of it, or a message to a peer whose handler asks this channel in turn, ends when its time is over. If it
  /// throws, the peer gets the error. A code of kvferry's arrives unchanged,
  /// except that this side's own end is not the peer's: `errc::closed` arrives as `errc::peer_closed`, `errc::cancelled`
  /// as `errc::peer_cancelled`, and `errc::forked` as `errc::handshake_failed`. Another code arrives as
  /// `errc::connection_lost` if it belongs to `condition::peer_failed`, as `resource_limit` if it is `retryable`, and
  /// else as `errc::handshake_failed`.
  ///
  /// The default answers nothing: it throws `errc::unhandled_side_message`. `kit::TransferChannelKit` answers
  /// `P2PInitSideMsg` and `PySocketInitRequest` as LMCache does.
  virtual SideMessage handle_init_side_msg(const SideMessage& message);

  /// Sends one side message to the channel that answers handshakes at `peer_init_url`, and returns its answer. The
  /// channel is one of kvferry's, or one of LMCache's if the message is LMCache's. Needs no connection and makes none.
  /// LMCache: `send_init_side_msg`.
  /// @param message at most `ChannelOptions::max_handshake_bytes` when encoded, as is the answer.
  /// @throws TransferError EMSGSIZE, `errc::invalid_url`, `errc::timed_out`, `errc::closed`, `errc::malformed_message`,
  ///   `errc::would_deadlock`, and the code of a `SideMessageError` that came as the answer.
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

  /// Makes the metadata that another channel's `connect` takes to connect to this one: the id that the other channel
  /// will use for this one, this incarnation, and the url that answers handshakes. The bytes are opaque and fewer than
  /// 1 KiB. They are not secret. They are valid until this channel is closed.
  /// @param local_id as for `lazy_init_peer_connection`.
  /// @throws TransferError `errc::empty_peer_id`, `errc::invalid_peer_id`, `errc::not_supported` (also if this channel
  ///   has no listener, or listens at a wildcard address without `ChannelOptions::advertised_init_url`),
  ///   `errc::forked`.
  [[nodiscard]] virtual std::vector<std::byte> local_metadata(std::string_view local_id) const = 0;

  /// Connects to the channel that made this metadata with `local_metadata`, as `lazy_init_peer_connection` does with
  /// its id and url. It connects to no other incarnation. Metadata is trusted no more than a url: it only says where to
  /// ask.
  /// @param local_id the id by which the peer will know this channel.
  /// @param metadata the bytes; the call copies them.
  /// @return the peer; its id is the one in the metadata.
  /// @throws TransferError `errc::malformed_message` if these bytes are no metadata, `errc::version_mismatch` or
  ///   `errc::transport_mismatch` if they are of another kind of channel, `errc::peer_restarted` if another incarnation
  ///   answers: then the metadata is out of date, and nothing was connected unless the peer changed meanwhile;
  ///   `errc::connection_lost` if the connection broke as soon as it was made; and the errors of
  ///   `lazy_init_peer_connection`.
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

  /// Ends the connection to a peer. Operations with the peer, and connects to it that are under way, end with
  /// `errc::cancelled`; an operation for which the peer did not answer in time ends with `cancelled_in_flight`. When
  /// the call has ended, no bytes of the peer land here any more, and none of this side's land there unless an
  /// operation's error says otherwise. The peer's operations with this channel end with `errc::peer_closed`, as after
  /// `close`.
  ///
  /// A later operation with the peer connects anew if its init url is known, and else ends with `errc::unknown_peer`.
  /// The peer may connect anew at any time. A peer that isn't connected is no error.
  ///
  /// The call drops the peer's notifications with a key for which no call waits. Receive those that you need first.
  ///
  /// The call takes as long as cancelling the peer's operations takes. It doesn't wait for operations that are started
  /// meanwhile. Cancelling the call ends only the wait.
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

  /// Hands out the next event of any peer, whichever side connected: oldest first, each once. From the channel's
  /// construction on, events wait in a queue of bounded length until a call takes them.
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
  /// @throws TransferError `errc::unknown_region` if this channel has no region of that number now;
  ///   `errc::not_in_region` if an object does not start at a page of the region or does not fit in it.
  [[nodiscard]] std::vector<std::uint64_t> get_local_mem_indices(const ConstObjects& objects,
                                                                 std::uint32_t region = 0) const;

  /// @}
  /// @name Paired operations
  /// @{

  /// Sends objects to the peer's recv with the same tag. The sender's n-th send of a tag meets the receiver's n-th recv
  /// of it. Sends and recvs that were cancelled or timed out don't count: a send meets the next recv if its own is
  /// gone. Object i goes to buffer i. Both batches must have the same number of objects (else both end with
  /// `errc::count_mismatch`), at most 2^20 (else E2BIG). An object that is larger than its buffer isn't transferred,
  /// and both sides report `errc::buffer_too_small` for it; the others arrive. LMCache: `batched_send`.
  /// @return the number of objects that are in the peer's buffers.
  /// @throws TransferError with the number of objects that are there in spite of the error.
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

  /// Writes objects into pages, or byte ranges, of the peer's regions. The call ends when they are in the peer's
  /// memory. The peer gets the notification, if there is one, only after that, whether or not this side makes another
  /// call. LMCache: `batched_write`.
  ///
  /// If a batch names a page more than once, the last object's bytes are in the page at the end. (Behind the end of a
  /// shorter object the earlier object's bytes remain.) The same holds for ranges that overlap.
  std::size_t batched_write(ConstObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_write(ConstObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_write(ConstObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::write, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// Reads pages, or byte ranges, of the peer's regions into buffers. It fills each buffer whole (with a stride: its
  /// blocks). If buffers of one batch overlap, they have the last one's bytes at the end.
  ///
  /// A notification is sent to the peer when the whole batch is in the buffers, for example to have it free its pages.
  /// The read then ends when the peer's queue has the notification. If any object fails, no notification is sent. If
  /// the notification is refused (`errc::resource_limit`), or not answered in time, the buffers have all objects
  /// nevertheless. If a read's error belongs to `condition::may_still_land`, the notification may still be handed out.
  /// LMCache: `batched_read`.
  std::size_t batched_read(MutableObjects objects, const TransferSpec& spec);
  /// As above, with the error in `ec`.
  std::size_t batched_read(MutableObjects objects, const TransferSpec& spec, std::error_code& ec);
  /// As above, asynchronously. Completion signature: `void(std::error_code, std::size_t)`.
  template <ASIO_COMPLETION_TOKEN_FOR(void(std::error_code, std::size_t)) CompletionToken>
  auto async_batched_read(MutableObjects objects, const TransferSpec& spec, CompletionToken&& token) {
    return async_transfer(make_request(TransferKind::read, std::move(objects), spec),
                          std::forward<CompletionToken>(token));
  }

  /// Starts any of the four transfers, given as a value: for decorators, and for programs that choose the kind at run
  /// time.
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
  /// A notification goes with a write or read (`TransferSpec::notification`), or alone (`notify`).
  /// `receive_notification` gets the notifications without a key, `receive_notifications` those with the key that it
  /// names.
  /// @{

  /// Sends a notification alone: a write of no objects. Ends when the peer's queue has the notification. Two that are
  /// under way at once may arrive in either order.
  /// @param payload 1 to `Capabilities::max_notification_bytes` bytes; copied by the call.
  /// @throws TransferError `errc::resource_limit` if the peer's queue is full and doesn't have the notification;
  ///   `errc::not_supported`, EINVAL (no bytes), `errc::notification_too_large`, and the errors of a write. If the
  ///   error belongs to `condition::may_still_land`, the peer may have the notification, or may still get it.
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

  /// Hands out the next notification without a key: oldest first, each once.
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

  /// Waits for the next `count` notifications of a key, from any peers, and hands them out, oldest first. So one call
  /// waits for all parts of a request. Calls for the same key are served one after the other: the first call gets the
  /// first `count`.
  ///
  /// At the timeout it hands out the notifications that have come, with `errc::timed_out`. (The throwing form returns
  /// fewer than `count` and doesn't throw.) After a cancellation the notifications stay in the queue.
  /// @param count at most `ChannelOptions::max_pending_notifications`; 0: ends at once with none. Notifications that
  ///   wait for the rest of the `count` count for the limits of the queue, in number and bytes.
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
  /// ended, their connection is shut, or they wait for a connection and will be refused when it is made. Call it before
  /// you reuse memory that a peer was told to write to, above all after a failure. docs/guide.md has the recipe.
  ///
  /// A connected peer is asked, and answers when the writes that it had started have ended. If it doesn't answer in
  /// time, its connection is broken, which is just as safe. If the peer's connection has failed or was replaced, the
  /// rest of it is shut. A write that waits at the peer for a new connection ends there with `errc::fenced` when the
  /// connection is made. If a connection is just being made, the fence waits for it: for a second, and longer while
  /// the transport has other ways behind one that doesn't answer (`AutoTransferChannel`), but not beyond `timeout`, or half
  /// of it if the peer is connected and has to answer in the rest. Then it gives the connection up, and what waits for it
  /// at the peer fails. For a peer that this channel doesn't know the call returns at once. Operations that the peer starts
  /// later, also over a new connection, are not held up. If it hasn't answered the fence, and the new connection's
  /// handshake takes long, writes that were started meanwhile may be refused too; also if it is this side that connects
  /// anew, over RDMA, or if the peer has restarted or knows this channel by another id.
  ///
  /// @param timeout how long the peer may take; unset: the channel's default.
  /// @throws TransferError `errc::empty_peer_id`, `errc::closed`, `errc::cancelled`, `errc::would_deadlock`. A
  ///   cancellation ends only the wait: the peer's older writes may still come in. Writes that wait at the peer for a new
  ///   connection still end there with `errc::fenced`.
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
  /// Each connected peer is told at once, on every connection to it, before anything that this channel starts later. So
  /// a peer that gets the number by a notification, or otherwise over these connections, can use the region. A number
  /// that travels another way (by a side message, a control plane) may arrive before the region's announcement. The
  /// peer then asks this side, and its operation goes on with the answer.
  ///
  /// A channel has at most 1,024 regions at a time, including regions that are being removed, and 2^31 in its life.
  /// @param region as for the constructor. The call registers it, which takes its time, and waits for no peer.
  /// @return the region's number: the next one that this channel has never used.
  /// @throws TransferError `errc::invalid_region`, `errc::not_supported` (also memory that this transport can't use),
  ///   `errc::resource_limit` (too many regions), `errc::closed`, `errc::would_deadlock` (in a log sink), and the errno of
  ///   a registration that failed. After an error there is no new region, and no peer has heard of one.
  std::uint32_t add_region(const MemoryRegion& region);
  /// As above, with the error in `ec`; the result is then 0.
  std::uint32_t add_region(const MemoryRegion& region, std::error_code& ec);

  /// Takes a region back. Returns when neither this channel nor its peers can touch the region's memory any more. You
  /// may then unmap it. Operations on other regions are not held up.
  ///
  /// From the call on, the peers' new accesses end with `errc::region_gone`. An operation that was under way gets this
  /// error for the objects that came too late, and for objects in one frame with them. Bytes on their way are let
  /// through. On each connection, the peer is asked to confirm that nothing is left. A connection on which it doesn't
  /// confirm in time is broken, which is just as safe. The call also waits for this channel's own operations with
  /// objects in the region. It cancels operations that take too long (`errc::cancelled` or `cancelled_in_flight`). It
  /// may then exceed `timeout` by the time that draining them takes.
  ///
  /// Memory that lies in another region as well stays open to peers there. Over shm, peers copy out of this process's
  /// memory themselves. A peer whose connection was broken may still read the region's addresses, for an operation that
  /// then fails. So unmap the memory, or put nothing there that the peer must not see.
  ///
  /// Later operations with objects in that memory treat it as memory outside of regions.
  ///
  /// The number is never used again. A second call for it while the first is under way waits for the same end, with its
  /// own timeout.
  /// @param timeout how long the peers and the operations may take; unset: the channel's default.
  /// @throws TransferError `errc::unknown_region` (there never was one), `errc::region_gone` (it was removed before),
  ///   `errc::not_supported`, `errc::closed`, `errc::cancelled`, `errc::would_deadlock`,
  ///   `std::errc::not_enough_memory`. A cancellation ends only the wait. The region is gone for peers, but its memory
  ///   may be in use until the removal ends; call again to wait for that. The same holds after
  ///   `std::errc::not_enough_memory`.
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
  /// answer the operation ends with `errc::closed_in_flight`. Within the same time this side sends the answers that its
  /// peers still wait for. When `close` returns, no buffer and no region is touched any more. Handlers may still be on
  /// their way to their executors. `close` waits for a running `handle_init_side_msg`, unless it is called there. It
  /// may be called again, and from a handler. LMCache: `close`.
  /// @throws TransferError `errc::would_deadlock` in a log sink (`LogSink`), and nothing is closed. An override that does
  /// something before it calls its base's calls `kit::refuse_in_log_sink` first.
  virtual void close() = 0;

  /// Makes a request of a spec and its objects. It copies their descriptors.
  [[nodiscard]] static TransferRequest make_request(TransferKind kind, ConstObjects objects, const TransferSpec& spec);
  [[nodiscard]] static TransferRequest make_request(TransferKind kind, MutableObjects objects,
                                                    const TransferSpec& spec);
  /// Makes the request for a write of no objects with a notification.
  [[nodiscard]] static TransferRequest make_notification(std::string_view peer_id, ConstBuffer payload,
                                                         const NotifySpec& spec);

 protected:
  /// @name Functions that a transport implements None of these may run the user's handler inside the call.
  ///   `CompletionHandler` posts it, so calling that is fine.
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
  /// Adds a region, on the caller's thread. The default throws `errc::not_supported`.
  /// @throws TransferError as `add_region`.
  virtual std::uint32_t run_add_region(const MemoryRegion& region);
  /// Starts the removal of a region. The default ends it with `errc::not_supported`.
  virtual void start_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                                   RemoveRegionCompletion completion);

  /// Makes a transfer on the caller's thread. The default waits for `start_transfer`. A transport that can post and
  /// poll on the caller's thread overrides it.
  virtual std::size_t run_transfer(TransferRequest request, std::error_code& ec);

  /// Whether the calling thread completes operations. A blocking call on it would never return. (Nor may one in a log
  /// sink. Blocking forms ask about both.)
  [[nodiscard]] virtual bool running_in_io_thread() const noexcept { return false; }
  /// The same of another channel: for a decorator, whose operations that one completes.
  [[nodiscard]] static bool running_in_io_thread_of(const BaseTransferChannel& other) noexcept {
    return other.running_in_io_thread();
  }
  /// Whether only the calling thread could answer a side message to that url: it runs `handle_init_side_msg`, and the url
  /// is the channel's own.
  [[nodiscard]] virtual bool answers_in_this_thread(std::string_view url) const {
    (void)url;
    return false;
  }
  /// Whether a blocking call on the calling thread could wait for that thread: it completes operations, or it is in a log
  /// sink.
  [[nodiscard]] bool must_not_block() const noexcept;
  /// @}

 private:
  std::size_t transfer_or_throw(TransferRequest request);
  void start_notify(TransferRequest request, NotifyCompletion completion);
};

}  // namespace kvferry

#endif  // KVFERRY_BASE_TRANSFER_CHANNEL_HPP
