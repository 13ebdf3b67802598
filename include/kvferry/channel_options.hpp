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
/// microseconds on many machines, and a polling thread occupies its core. A thread polls only connections on which
/// bytes came or went within this time, and a blocking call only its own peer's connection. So an idle channel sleeps.
struct PollPolicy {
  std::chrono::microseconds spin{50};

  /// Sleeps at once: least CPU, highest latency.
  [[nodiscard]] static constexpr PollPolicy never() noexcept { return {std::chrono::microseconds::zero()}; }
  /// Never sleeps once something has happened on a connection: costs a core for as long as there are connections.
  [[nodiscard]] static constexpr PollPolicy always() noexcept { return {std::chrono::microseconds::max()}; }
};

/// Options of every channel, whatever its transport.
struct ChannelOptions {
  /// The memory offered to peers. LMCache: `buffer_ptr`, `buffer_size`, `align_bytes`.
  std::vector<MemoryRegion> regions;

  /// Where to answer handshakes: `tcp://host:port` or `host:port`, port 0 for any free one, host `*` for all addresses.
  /// A host that is a name is looked up by the constructor, for at most `handshake_timeout`; of several addresses one of
  /// this host's is taken.
  /// Empty: no listener; the channel can connect, but not be connected to. LMCache: `peer_init_url`.
  std::string peer_init_url;

  /// The address that peers are told, where it differs from the bound one (NAT, a wildcard bind). Port 0
  /// stands for the bound port. Empty: the bound address, or nothing if that is a wildcard: then a peer that was
  /// connected to from here can't connect again by itself.
  std::string advertised_init_url;

  /// The answer to LMCache's `P2PInitSideMsg`; empty where there is none, as with LMCache. LMCache: `peer_lookup_url`.
  std::string peer_lookup_url;

  /// Whether side messages and peers' handshakes wait until `answer_side_messages()` is called. Set it in subclasses of
  /// a transport, above all if they override `handle_init_side_msg`. Otherwise a peer's message could come while the
  /// constructor still runs, and meet a half-made object.
  bool hold_side_messages = false;

  /// Whether a write or read by page index fails with `errc::page_size_mismatch` if the two sides' regions of its
  /// number have pages of different sizes. LMCache assumes that they never differ. Only regions count that the channels
  /// were made with and still have. Byte ranges (`TransferSpec::remote_ranges`) and regions that were added later are
  /// not concerned.
  bool require_equal_page_sizes = true;

  /// Whether transfers have checksums, unless `TransferSpec::checksums` says otherwise: XXH3-64 of each object. The
  /// source takes it as the bytes leave, and the destination compares it with the bytes that have landed. The peer's
  /// option doesn't matter. Checksums find errors on the way, and in either side's memory until then, but no changes on
  /// purpose. If the transport has none (`Capabilities::checksums`), the constructor throws `errc::not_supported`.
  bool checksums = false;

  /// How many peers the channel knows of each of two kinds: peers that the user has named
  /// (`lazy_init_peer_connection`), and peers that came by themselves. Neither kind displaces the other. With one peer
  /// more of a kind, the channel forgets the one that has been out of use for longest. If all are in use, the handshake
  /// is refused with `errc::resource_limit`. Connections of peers that came by themselves are also bounded by address
  /// and by half of RLIMIT_NOFILE, as it is when the channel is made or as it is raised later. A connection that was
  /// never used gives way to a newer one. If all have been used, newer ones are refused with `errc::resource_limit`.
  std::size_t max_peers = 4096;

  /// The deadline of transfers that set none.
  std::chrono::milliseconds default_timeout{30'000};

  /// The deadline of handshakes and side messages that set none.
  std::chrono::milliseconds handshake_timeout{10'000};

  /// How many operations may be pending at a time; a call beyond that ends with `errc::resource_limit`.
  std::size_t max_pending_operations = std::size_t{1} << 16;

  /// How many events wait for `wait_peer_event`; with one more, the oldest is dropped, and the next one counts it
  /// (`PeerEvent::missed`).
  std::size_t max_pending_peer_events = 1024;

  /// How many notifications wait for `receive_notification` and `receive_notifications`; a write that brings one more
  /// ends with `errc::resource_limit` at its initiator: its data has landed, its notification is not handed out.
  std::size_t max_pending_notifications = std::size_t{1} << 16;
  /// How many of those of one peer: `receive_notifications` for more of one key needs several peers.
  std::size_t max_pending_notifications_of_peer = std::size_t{1} << 14;

  /// Where I/O and handlers without an executor of their own run. Unset: threads of the channel's own. An executor
  /// given here must be run by the caller until the channel is closed, and its context must outlive the channel. With
  /// threads of the channel's own, the destructor runs the handlers that are left and waits until nothing else uses
  /// their executor.
  std::optional<asio::any_io_executor> executor;

  /// How many threads of its own the channel has, if it is given no executor. Handlers without an executor of their own
  /// run on them; one that takes long holds up the connections that its thread is looking at, even if another thread
  /// has nothing to do. 0 counts as 1. More than 1,024 are an error of the constructor's: EINVAL.
  std::size_t io_threads = 1;

  /// How those threads wait, and threads in blocking calls.
  PollPolicy poll;

  /// Where this channel's log records go, instead of to the process's sink: see `set_log_sink`. Empty: to that one.
  LogSink log_sink;
  /// The least level that `log_sink` gets.
  LogLevel log_level = LogLevel::info;

  /// The largest handshake or side message, in bytes, either way. A larger one of this side's ends with EMSGSIZE; a
  /// larger one of a peer's is answered with an error, and is not read at all if it has more than twice as many. What
  /// strangers may make this process store and look at grows with it (docs/security.md). Raise it on both sides for
  /// long side messages, and for RDMA regions that are registered in many thousands of slices.
  std::size_t max_handshake_bytes = std::size_t{64} << 10;

  /// Bytes of notifications that wait for `receive_notification`, each counted with its peer's id and 128 bytes for
  /// keeping it, 768 if it has a key: in all, and of one peer. A write that brings more ends as described at
  /// `max_pending_notifications`. Where others have filled the queue, each peer still finds room for 16 notifications
  /// of up to 128 KiB together.
  std::size_t max_pending_notification_bytes = std::size_t{64} << 20;
  std::size_t max_pending_notification_bytes_of_peer = std::size_t{16} << 20;

  /// Bytes that recvs take up which peers have posted and no send of this channel's has met: in all, and of one peer.
  /// One more is refused: it ends with `errc::resource_limit` at the peer. Where others have taken all, each peer still
  /// finds room for 64 KiB, which are some 300 recvs of one buffer.
  std::size_t max_posted_recv_bytes = std::size_t{128} << 20;
  std::size_t max_posted_recv_bytes_of_peer = std::size_t{32} << 20;

  /// Bytes of side messages that wait for `handle_init_side_msg`: in all, and from one address. One more is answered with
  /// `errc::resource_limit`.
  std::size_t max_pending_side_message_bytes = std::size_t{8} << 20;
  std::size_t max_pending_side_message_bytes_of_source = std::size_t{2} << 20;

  /// Secures handshakes and side messages. They are encrypted. Only peers whose key the keyring has get through, each
  /// under the id that the keyring has its key for. All peers need a keyring, and nothing falls back: without a keyring
  /// on the other side, connecting ends with `errc::authentication_failed`. Data connections prove that they are the
  /// peer's, by a secret from the handshake. Over TCP they are encrypted as well (`TcpOptions::encryption`,
  /// docs/security.md). A channel with a keyring has a ZeroMQ context of its own, and two more threads. Null: no keys.
  std::shared_ptr<const Keyring> keyring = nullptr;

  /// Pages leave this host encrypted or not at all: a channel that would move them in the clear is not made
  /// (`std::errc::invalid_argument`). TCP takes a keyring for that; RDMA can't, unless `RdmaOptions::trusted_fabric` says that
  /// its network needs no encryption. What stays within the host needs none.
  bool require_encryption = false;

  /// A ZeroMQ context (`void*` as of `zmq_ctx_new`) to use for handshakes; it stays the caller's and is never
  /// terminated. Null: one that the process's channels share. Not with a keyring.
  void* zmq_context = nullptr;

  /// Set by a channel of several transports (`AutoTransferChannel`) for the channels that it consists of. These answer
  /// no handshakes and know no peers. Users leave it null.
  std::shared_ptr<const kit::RoadOf> road_of = nullptr;
};

}  // namespace kvferry

#endif  // KVFERRY_CHANNEL_OPTIONS_HPP
