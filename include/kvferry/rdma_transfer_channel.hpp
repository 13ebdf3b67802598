// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_RDMA_TRANSFER_CHANNEL_HPP
#define KVFERRY_RDMA_TRANSFER_CHANNEL_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>
#include <kvferry/rdma_error.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A port of an RDMA device that a channel uses.
struct RdmaRail {
  std::string device;     ///< The name in `ibv_devices`' list: "mlx5_0", "rxe0".
  std::uint8_t port = 1;  ///< From 1.
  /// An entry of the port's GID table. Unset: the entry of the advertised address, if the port has it. Else, with RoCE,
  /// the first RoCE v2 entry of an IPv4 address, or of an IPv6 address that is not link-local, or any RoCE v2 entry, in
  /// this order. On InfiniBand, the first entry that is not link-local, if there is one.
  std::optional<std::uint32_t> gid_index = {};
  /// The key of the rail's InfiniBand partition; its bit for full membership is ignored. Unset: the first entry of the
  /// port's table.
  std::optional<std::uint16_t> partition_key = {};
};

/// Options of an RDMA channel. Sizes are in bytes.
struct RdmaOptions : ChannelOptions {
  /// The rails. Rail n of one side is joined with rail n of the other. Rails that only one side has, and rails that are
  /// not active or can't be used at the moment (the device has failed, the port has no address), are left out.
  /// `PeerInfo::path` names the rails in use. Empty: one rail, on the device that has the address of
  /// `advertised_init_url` or `peer_init_url`, or else on the first active one.
  std::vector<RdmaRail> rails;

  /// One-sided batches of at least this many bytes are spread over the rails, in parts of whole objects; smaller ones go over
  /// one rail each, in turn. An object goes over one rail, however large it is: cut a large range into several.
  std::size_t stripe_threshold = std::size_t{1} << 20;

  /// Queue pairs to each peer on each rail, 1 to 8; the smaller of both sides' numbers counts. They share the rail's protection
  /// domain and registrations. Some adapters, and networks with several paths, move large batches faster over several; on others
  /// nothing is gained. Nobody has measured it with kvferry on an adapter. Raise it only where a measurement says so: `ib_write_bw
  /// -q` of perftest, or `transfer_bench --queue-pairs`.
  ///
  /// Each further queue pair costs what the first one does, for each peer on each rail: 64 KiB of pinned memory for messages, and
  /// up to 768 KiB if many are sent at a time; a descriptor; of the device, a queue pair and a completion queue (`max_qp` and
  /// `max_cq` of `ibv_devinfo -v`) for `queue_depth` requests. Announcements of regions, and probes (`keepalive_interval`), go over
  /// each one. A connection does with fewer if there is no room for more: `PeerInfo::path` names those in use. If one breaks, the
  /// connection does.
  std::size_t queue_pairs_per_rail = 1;

  /// With several queue pairs on a rail: a one-sided batch, or a rail's part of one that is spread over the rails, of at least this
  /// many bytes is spread over all queue pairs of the rail, in parts of whole objects. All other operations use the first one. The
  /// thread of a blocking call moves bytes itself only over the first one.
  std::size_t queue_pair_threshold = std::size_t{1} << 20;

  /// Regions are registered in slices of this size. Some adapters are slower with larger memory regions.
  std::size_t slice_bytes = std::size_t{3584} << 20;

  /// Lets the adapters put the bytes of writes and reads into regions in any order (PCIe's relaxed ordering), which some hosts need
  /// for their full bandwidth. Messages are not concerned: what comes with or behind one - a notification, the end of a recv, a
  /// fence, checksums - finds all bytes of earlier writes in place, and this side's reads are whole when they end. Without such a
  /// message in between, of two writes to the same bytes the older one may be what is left, and a read may miss a write that was
  /// there before it. That is an exception to **Order** of `BaseTransferChannel`. Programs that poll memory for a write's last byte
  /// must not use it. It is about this side's regions; kernels that don't know it ignore it. Nobody has measured it with kvferry.
  bool relaxed_ordering = false;

  /// How many work requests a connection has posted at a time, if the device has room for them. A longer batch is
  /// posted as they complete. At least 16.
  std::size_t queue_depth = 256;

  /// How many RDMA reads a connection has under way at a time, if both devices allow it.
  std::size_t read_depth = 128;

  /// A send's objects of up to this size travel in messages, out of which the receiver copies them. Larger ones are
  /// written straight into the receiver's buffers, if these lie in a region that peers may write to, or are large
  /// enough to be registered for this one operation. At most 4 KiB.
  std::size_t eager_bytes = 4096;

  /// How long an adapter waits for the peer's adapter before it sends again (4.096 us times a power of two, rounded
  /// up), and how often it sends again (at most 6: Soft-RoCE takes 7 for "without end"). Together they are the time
  /// after which a lost peer, host or network is noticed.
  std::chrono::milliseconds ack_timeout{250};
  unsigned retry_count = 6;

  /// A connection on which nothing happened for this long is probed. The peer's adapter answers the probe by itself.
  /// Zero: never.
  std::chrono::milliseconds keepalive_interval{2'000};

  /// How long an operation that passed its deadline, or was cancelled, may wait for its requests that the adapters have
  /// under way. After that its queue pair is destroyed, together with all operations on it, and the operation ends.
  /// `close()` spends at most this long, or 200 ms if that is longer, to tell the peers that their data has arrived and that
  /// the connection ends.
  std::chrono::milliseconds drain_timeout{250};

  /// For a recv's list of buffers, or a notification, that comes in several messages: how long the peer may take to
  /// send the rest of it, or the next 64 KiB of the rest. After that the connection is given up, and its operations end
  /// with `errc::connection_lost`. From 10 milliseconds to an hour.
  std::chrono::milliseconds parts_timeout{60'000};

  /// Declares that nobody else uses the network of the rails, or that the network encrypts (IPsec, MACsec). RDMA's
  /// packets carry pages and the keys to memory (rkeys) in the clear, and no program can change that. With this option
  /// a channel may be made with `ChannelOptions::require_encryption`, and be a road of an `AutoTransferChannel` with a
  /// keyring.
  bool trusted_fabric = false;

  /// Registers all regions anew for each connection, in a protection domain of its own on each rail, rather than once for
  /// all. So the keys to memory (rkeys) that a peer is told, with the handshake or with a recv's buffers, are of no use on
  /// another peer's connection. They open nothing any more when `disconnect` has returned, or when the connection has ended.
  /// Without this a key opens its memory to every peer that gets or guesses it, as long as the region, or the recv, lasts.
  /// Its limits: a peer that may connect gets keys of its own, each as good as the region's `peer_access`. Packets have keys
  /// and pages in the clear: somebody on the path can still use a connection's keys on that connection.
  ///
  /// Its cost:
  /// - Connecting takes as long as the channel's construction does without it, on the calling thread where this side
  ///   connects. `add_region` registers for all connections.
  /// - Deregistering takes its time as well. `disconnect`, a peer's new connection in place of its old one, and the end of
  ///   `remove_region` do that on an I/O thread. A removal also waits there for connections that are being made, if they are
  ///   registering the region. With one I/O thread (`io_threads`) nothing else is done meanwhile.
  /// - All regions count against `ulimit -l` once for each connection and each attempt, and for a broken connection until it
  ///   is deregistered: to reconnect takes room for two. The adapter has tables of their pages for each. Each also takes a
  ///   protection domain of each rail's device, and a memory region for each slice: `max_pd` and `max_mr` of `ibv_devinfo -v`.
  /// - The channel has a duplicate of a dma-buf's descriptor (`MemoryRegion::dmabuf_fd`), until the region is removed.
  /// - An attempt to connect fails if a region can't be registered for it, and disturbs nobody else. At the limit this side
  ///   gets ENOMEM where it connects, and a peer that connects gets `errc::resource_limit`. `add_region` fails if the region
  ///   can't be registered for each peer that is connected or connecting.
  /// - Each stranger's handshake costs this much where strangers reach the port: have a `keyring`.
  ///
  /// Each side decides for itself.
  bool isolate_peers = false;

  std::uint8_t service_level = 0;  ///< InfiniBand, and RoCE's priority.
  std::uint8_t traffic_class = 0;  ///< RoCE: DSCP and ECN bits.
};

/// How full a rail's adapter was kept. A batch's requests go out in lists, each of which completes as a whole. A connection has
/// several of them under way, at most 8 MiB or `RdmaOptions::queue_depth` requests in all. These count the lists that completed
/// when more of their connection's batches was still to be posted.
struct RdmaWindow {
  std::uint64_t lists = 0;
  std::uint64_t drained = 0;  ///< How many of them left nothing under way.
  double left = 0;            ///< The share of what may be under way that was, on average.
};

/// Describes a rail of a channel.
struct RdmaRailInfo {
  std::string device;
  std::uint8_t port = 0;
  std::uint64_t bytes_written = 0;  ///< By this side's writes and sends to all peers, including messages.
  std::uint64_t bytes_read = 0;     ///< By reads of this side.
  RdmaWindow window = {};           ///< Of this side's writes, reads and sends.
};

/// Moves pages by RDMA, with reliable connections of libibverbs, over InfiniBand or RoCE. `BaseTransferChannel` has the
/// promises of every channel, docs/wire_protocol.md the messages on the wire.
///
/// Regions are registered on each rail, at construction or by `add_region`; with `RdmaOptions::isolate_peers` for each
/// connection, and the constructor only tries it. Their memory counts against `ulimit -l` until `remove_region` ends. A
/// region that is added later may have at most 238 slices (`RdmaOptions::slice_bytes`), else `add_region` fails with
/// `errc::resource_limit`. Objects may lie outside of all regions: small ones are copied through registered memory,
/// large ones are registered for the time of their operation. A region with a `dmabuf_fd` is registered by that
/// descriptor. Its memory can be used for writes and reads, but not for sends and recvs.
///
/// With several rails, or queue pairs of a rail, an operation may go over another one than the one before it. A write ends when the
/// peer's adapter has acknowledged its bytes, which may be a moment before they are in the peer's memory. Later requests on the
/// same queue pair come behind them; requests on another one may, within that moment, overtake them. That is an exception to **Order** of
/// `BaseTransferChannel`. It doesn't concern a write's own notification, paired operations of one tag, or `fence`. Where a
/// write has to follow another one on the same bytes, or be followed by a `notify` or a read of them, give the first one the
/// notification, or checksums, or use one rail with one queue pair.
///
/// If a deadline passes while the adapters work on an operation's requests, the operation may end up to
/// `RdmaOptions::drain_timeout` later.
///
/// A subclass that overrides `handle_init_side_msg` sets `hold_side_messages`, calls `answer_side_messages()` at the
/// end of its constructor, and calls `close()` in its destructor. So no message reaches a half-made or half-destroyed
/// object.
class KVFERRY_EXPORT RdmaTransferChannel : public kit::TransferChannelKit {
 public:
  /// Opens the devices, registers the regions, and starts listening if there is a `peer_init_url`.
  /// @throws TransferError `errc::invalid_region`, `errc::invalid_url`, `errc::timed_out` (the lookup of a name to
  ///   listen at); the errno of a bind, of a device that can't be opened, or of memory that can't be registered; EINVAL
  ///   for `require_encryption` without `RdmaOptions::trusted_fabric`; ENODEV if there is no device, or no active one;
  ///   EINVAL if there is no device of a given name, no such port or no such partition; EOPNOTSUPP for a device that
  ///   isn't InfiniBand or RoCE. The error's sentence names the device.
  explicit RdmaTransferChannel(RdmaOptions options);
  ~RdmaTransferChannel() override;

  /// The active ports of this machine's InfiniBand and RoCE devices, in the order in which libibverbs lists them; iWARP
  /// and EFA devices are left out. Some may be on networks that don't reach each other.
  [[nodiscard]] static std::vector<RdmaRail> active_rails();

  [[nodiscard]] std::string_view transport() const noexcept override;
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  [[nodiscard]] ChannelStats stats() const override;

  /// The channel's rails and their counters.
  [[nodiscard]] std::vector<RdmaRailInfo> rails() const;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] bool run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) override;
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override;
  void register_region(const LocalRegion& region) override;
  [[nodiscard]] std::function<void(std::uint32_t)> region_forgetter() override;
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override;
  void stop_listening() override;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry

#endif  // KVFERRY_RDMA_TRANSFER_CHANNEL_HPP
