// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_CHANNEL_OPTIONS_HPP
#define KVFERRY_CHANNEL_OPTIONS_HPP

#include <asio/any_io_executor.hpp>

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <kvferry/keyring.hpp>
#include <kvferry/log.hpp>
#include <kvferry/memory_region.hpp>

namespace kvferry::inline KVFERRY_ABI {

namespace kit {
struct RoadOf;
}

/// How long a waiting thread polls its connections before it sleeps. Waking a sleeping thread takes tens of
/// microseconds on many machines. A polling thread occupies its core. A thread polls only connections on which bytes
/// came or went within this time; a blocking call polls only its own peer's connection. So an idle channel sleeps.
struct PollPolicy {
  std::chrono::microseconds spin{50};

  /// Sleeps at once: least use of the CPU, highest latency.
  [[nodiscard]] static constexpr PollPolicy never() noexcept { return {std::chrono::microseconds::zero()}; }
  /// Never sleeps once something has happened on a connection: costs a core for as long as there are connections.
  [[nodiscard]] static constexpr PollPolicy always() noexcept { return {(std::chrono::microseconds::max)()}; }
};

/// Options of every channel, whatever its transport.
struct ChannelOptions {
  /// The memory offered to peers. LMCache: `buffer_ptr`, `buffer_size`, `align_bytes`.
  std::vector<MemoryRegion> regions;

  /// Where to answer handshakes: `tcp://host:port` or `host:port`. Port 0: any free port. Host `*`: all addresses. The
  /// constructor looks a host name up, for at most `handshake_timeout`; if it has several addresses, one of this host's
  /// is taken. Empty: no listener, so the channel can connect, but no peer can connect to it. LMCache: `peer_init_url`.
  std::string peer_init_url;

  /// The address that peers are told, if it differs from the bound one (NAT, a wildcard bind). Port 0 stands for the
  /// bound port. A wildcard host isn't an address, and the constructor throws `errc::invalid_url`. Empty: the bound
  /// address, or none if that is a wildcard. Without an address, a peer to which this side connected can't reconnect by
  /// itself.
  std::string advertised_init_url;

  /// The url with which to answer LMCache's `P2PInitSideMsg`; empty if there is none. LMCache: `peer_lookup_url`.
  std::string peer_lookup_url;

  /// Whether side messages and peers' handshakes wait until `answer_side_messages()` is called. Set it in a subclass of
  /// a transport, above all if it overrides `handle_init_side_msg`. Otherwise a peer's message could come while the
  /// constructor still runs, and reach a half-made object.
  bool hold_side_messages = false;

  /// Whether a write or read by page index fails with `errc::page_size_mismatch` if the two sides' regions of the same
  /// number have pages of different sizes. LMCache assumes that they never differ. The check is for regions with which
  /// the channels were made and which they still have. It is not made for byte ranges (`TransferSpec::remote_ranges`)
  /// and for regions that were added later.
  bool require_equal_page_sizes = true;

  /// Whether transfers have checksums, XXH3-64 of each object, unless `TransferSpec::checksums` says otherwise. The
  /// source computes the checksum as the bytes leave, and the destination compares it with the bytes that have landed.
  /// The peer's option doesn't matter. Checksums find errors on the way, and in either side's memory until then. They
  /// don't find changes made on purpose. If the transport has no checksums (`Capabilities::checksums`), the constructor
  /// throws `errc::not_supported`. docs/performance.md has the cost.
  bool checksums = false;

  /// How many peers of each of two kinds the channel knows: peers that the user has named
  /// (`lazy_init_peer_connection`), and peers that connected by themselves. Neither kind displaces the other. When one
  /// more peer of a kind comes, the channel forgets the peer of that kind that has been out of use for longest. If all
  /// are in use, the handshake is refused with `errc::resource_limit`. Connections of peers that connected by
  /// themselves are also limited by address and by half of RLIMIT_NOFILE, as it is when the channel is made, or as it
  /// is raised later. A connection that was never used gives way to a newer one. If all have been used, newer ones are
  /// refused with `errc::resource_limit`.
  std::size_t max_peers = 4096;

  /// The timeout of transfers that set none.
  std::chrono::milliseconds default_timeout{30'000};

  /// The timeout of handshakes and side messages that set none.
  std::chrono::milliseconds handshake_timeout{10'000};

  /// How many operations may be pending at a time; a call beyond that ends with `errc::resource_limit`.
  std::size_t max_pending_operations = std::size_t{1} << 16;

  /// How many events wait for `wait_peer_event`. When one more comes, the oldest is dropped, and the next event counts
  /// it (`PeerEvent::missed`).
  std::size_t max_pending_peer_events = 1024;

  /// How many notifications wait for `receive_notification` and `receive_notifications`. A write that brings one more
  /// ends with `errc::resource_limit` at its initiator: its data has landed, but its notification is not handed out.
  std::size_t max_pending_notifications = std::size_t{1} << 16;
  /// How many of them may be one peer's. If `receive_notifications` waits for more of one key, they must come from
  /// several peers.
  std::size_t max_pending_notifications_of_peer = std::size_t{1} << 14;

  /// The executor of the channel's I/O, and of handlers without an executor of their own. Unset: the channel has
  /// threads of its own for them. If you give an executor, you must run it until the channel is closed, and its context
  /// must outlive the channel. If the channel has threads of its own, the destructor runs the remaining handlers and
  /// waits until nothing else uses their executor.
  std::optional<asio::any_io_executor> executor;

  /// How many threads of its own the channel has, if it is given no executor. Handlers without an executor of their own
  /// run on them. A handler that takes long holds up the connections that its thread is looking at, even if another
  /// thread is idle. 0 counts as 1. With more than 1,024 the constructor throws EINVAL.
  std::size_t io_threads = 1;

  /// How those threads, and threads in blocking calls, wait.
  PollPolicy poll;

  /// Where this channel's log records go, instead of to the process's sink: see `set_log_sink`. Empty: to that one.
  LogSink log_sink;
  /// The least level that `log_sink` gets.
  LogLevel log_level = LogLevel::info;

  /// The largest handshake or side message, in bytes, in both directions. Sending a larger one ends with EMSGSIZE. A
  /// larger one of a peer is answered with an error; it is not read at all if it is more than twice as large. Strangers
  /// can make this process store and parse more if the limit is higher (docs/security.md). Raise it on both sides for
  /// long side messages, and for RDMA regions that are registered in many thousands of slices.
  std::size_t max_handshake_bytes = std::size_t{64} << 10;

  /// Bytes of notifications that wait for `receive_notification`: in all, and of one peer. Each notification counts
  /// with its payload, its peer's id, and another 128 bytes, or 768 if it has a key. A write that brings more ends as
  /// described at `max_pending_notifications`. If others have filled the queue, each peer still has room for 16
  /// notifications of up to 128 KiB together.
  std::size_t max_pending_notification_bytes = std::size_t{64} << 20;
  std::size_t max_pending_notification_bytes_of_peer = std::size_t{16} << 20;

  /// Bytes that this channel keeps for the peers' recvs that no send has met yet: in all, and of one peer. A recv
  /// beyond that is refused, and ends with `errc::resource_limit` at the peer. If others have taken all, each peer
  /// still has room for 64 KiB, which is some 300 recvs of one buffer.
  std::size_t max_posted_recv_bytes = std::size_t{128} << 20;
  std::size_t max_posted_recv_bytes_of_peer = std::size_t{32} << 20;

  /// Bytes of side messages that wait for `handle_init_side_msg`: in all, and from one address. A message beyond that
  /// is answered with `errc::resource_limit`.
  std::size_t max_pending_side_message_bytes = std::size_t{8} << 20;
  std::size_t max_pending_side_message_bytes_of_source = std::size_t{2} << 20;

  /// Secures handshakes and side messages: they are encrypted, and only peers with a key in the keyring can connect,
  /// each under the id for which the keyring has its key. All peers need a keyring, and nothing falls back: if the
  /// other side has no keyring, connecting ends with `errc::authentication_failed`. Data connections prove that they
  /// are the peer's, by a secret from the handshake. Over TCP they are encrypted as well (`TcpOptions::encryption`,
  /// docs/security.md). A channel with a keyring has a ZeroMQ context of its own, and two more threads. Null: no keys.
  std::shared_ptr<const Keyring> keyring = nullptr;

  /// Pages leave this host encrypted or not at all: the constructor of a channel that would send them in the clear
  /// throws `std::errc::invalid_argument`. TCP needs a keyring for that. RDMA can't encrypt; its channel is made only
  /// if `RdmaOptions::trusted_fabric` says that its network needs no encryption. Pages that stay within the host need
  /// none.
  bool require_encryption = false;

  /// A ZeroMQ context (`void*` as of `zmq_ctx_new`) to use for handshakes. It stays the caller's; kvferry never
  /// terminates it. Null: a context that the process's channels share. Not with a keyring.
  void* zmq_context = nullptr;

  /// Set by a channel of several transports (`AutoTransferChannel`) for the channels that it consists of. These answer
  /// no handshakes and know no peers. Users leave it null.
  std::shared_ptr<const kit::RoadOf> road_of = nullptr;
};

}  // namespace kvferry

#endif  // KVFERRY_CHANNEL_OPTIONS_HPP
