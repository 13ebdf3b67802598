// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_CHANNEL_STATS_HPP
#define KVFERRY_CHANNEL_STATS_HPP

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// How long operations took, counted in buckets that double.
struct KVFERRY_EXPORT LatencyHistogram {
  /// 1 us, 2 us, 4 us, ... 2^25 us (33.6 s), and one for longer durations.
  static constexpr std::size_t bucket_count = 27;

  std::array<std::uint64_t, bucket_count> counts{};
  std::chrono::nanoseconds sum{0};

  /// The longest duration that bucket `index` counts; the maximum of the type for the last.
  [[nodiscard]] static std::chrono::nanoseconds upper_bound(std::size_t index) noexcept;
  /// The bucket that counts `duration`.
  [[nodiscard]] static std::size_t bucket_of(std::chrono::nanoseconds duration) noexcept;

  [[nodiscard]] std::uint64_t count() const noexcept;
  /// The upper bound of the bucket in which the `fraction`-quantile lies (0.5: the median); zero if nothing was
  /// counted.
  [[nodiscard]] std::chrono::nanoseconds quantile(double fraction) const noexcept;
};

/// Counts the operations of one kind since the channel was made.
struct KVFERRY_EXPORT TransferStats {
  /// Operations that ended with the same error.
  struct Failures {
    std::error_code cause;
    std::uint64_t operations = 0;
  };

  std::uint64_t started = 0;
  std::uint64_t succeeded = 0;
  /// Includes cancelled and refused operations, but not calls that ended with `errc::would_deadlock`. Ordered by cause.
  std::vector<Failures> failures;
  std::uint64_t objects = 0;  ///< Transferred objects, including those of failed operations.
  std::uint64_t bytes = 0;    ///< Of these objects.
  LatencyHistogram latency;   ///< From the call to the end, of the operations that succeeded.

  [[nodiscard]] std::uint64_t failed() const noexcept;
  [[nodiscard]] std::uint64_t in_flight() const noexcept { return started - succeeded - failed(); }
};

/// Counts the bytes over one lane (TCP: the connections of that number, of all peers) or rail (RDMA: a port of a device).
struct PathStats {
  std::string name;  ///< "lane 0", "rail 1 mlx5_0:1"
  /// Bytes that this side moved out and in, including the transport's own. TCP: all bytes that went through the sockets
  /// after the greetings. RDMA: the bytes that this side's work requests wrote or sent, and read. Bytes that peers
  /// write and read are counted only at the peers.
  std::uint64_t bytes_out = 0;
  std::uint64_t bytes_in = 0;
};

/// Counts the connections over one road of an `AutoTransferChannel`.
struct RoadStats {
  std::string name;
  std::uint64_t taken = 0;  ///< Connections, whichever side asked for them.
  /// How many of these fell back from a better road, for another reason than that the peer is on another host.
  std::uint64_t fallbacks = 0;
};

/// How often something ended with the same error.
struct CauseCount {
  std::error_code cause;
  std::uint64_t count = 0;
};

/// Counts handshakes by outcome since the channel was made.
struct HandshakeStats {
  std::uint64_t dialed = 0;       ///< Connections that this side asked for.
  std::uint64_t accepted = 0;     ///< Connections that peers asked for.
  std::uint64_t reconnected = 0;  ///< How many of both kinds were to a peer that had been connected before.
  std::vector<CauseCount> failed;   ///< Attempts of this side that failed; ordered by cause.
  std::vector<CauseCount> refused;  ///< Attempts of others that were refused or failed; ordered by cause.
};

/// One peer that the channel knows.
struct PeerStats {
  std::string id;
  bool connected = false;
  std::uint64_t connects = 0;   ///< Connections to it so far, including the present one.
  std::uint64_t succeeded = 0;  ///< Operations.
  std::uint64_t failed = 0;     ///< Operations that failed after they had reached its connection, or a wait for one.
  std::uint64_t bytes = 0;      ///< Of the objects that were transferred.
};

/// A snapshot of a channel's counters. They are read one by one while the channel works, so an operation that is just
/// ending may be in some of them and not yet in others. `in_flight()` is never negative.
struct ChannelStats {
  std::string transport;
  std::size_t connected_peers = 0;
  /// Connects that were refused with `errc::identity_conflict`, here or by the peer: two channels have the same id.
  std::uint64_t identity_conflicts = 0;
  /// How often another incarnation took a known peer's place: the peer restarted, or moved.
  std::uint64_t peer_replacements = 0;
  /// How often the bytes that landed on this side differed from the bytes that were sent (`TransferSpec::checksums`).
  /// Counts objects; an object of more than 1 MiB, or over RDMA of more than 4,096 blocks, counts by its parts.
  std::uint64_t checksum_mismatches = 0;
  HandshakeStats handshakes;
  /// Connections to the channel's ports that were closed, and messages that were refused, before their sender was
  /// known: they were malformed, not finished in time, or too many. Ordered by cause.
  std::vector<CauseCount> refused_strangers;
  std::vector<PeerStats> peers;  ///< Ordered by id, without peers that were forgotten (`ChannelOptions::max_peers`).
  std::size_t pending_notifications = 0;  ///< Notifications that wait for `receive_notification`.
  std::array<TransferStats, 4> transfers;  ///< By `TransferKind`.
  std::vector<PathStats> paths;
  std::vector<RoadStats> roads;  ///< Of an `AutoTransferChannel`, the best first.
  /// More labels for the Prometheus text, for programs with several channels. `stats()` leaves the map empty.
  std::map<std::string, std::string> labels;

  [[nodiscard]] const TransferStats& of(TransferKind kind) const {
    return transfers.at(static_cast<std::size_t>(kind));
  }
};

/// Writes the statistics of a program's channels in Prometheus' text format, version 0.0.4. Serve it with the content
/// type `text/plain; version=0.0.4`. The label `cause` is the error's `error_name`. Counters are named
/// `kvferry_..._total`, durations are in seconds, sizes in bytes. Channels of the same transport need `labels` that
/// tell them apart.
/// @throws TransferError `std::errc::invalid_argument` for a label name that Prometheus forbids or kvferry uses itself.
///   Source: https://prometheus.io/docs/instrumenting/exposition_formats/
[[nodiscard]] KVFERRY_EXPORT std::string to_prometheus(std::span<const ChannelStats> channels);
[[nodiscard]] KVFERRY_EXPORT std::string to_prometheus(const ChannelStats& channel);

}  // namespace kvferry

#endif  // KVFERRY_CHANNEL_STATS_HPP
