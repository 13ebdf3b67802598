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
  /// 1 us, 2 us, 4 us, ... 2^25 us (33.6 s), and one for what took longer.
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
  /// Cancelled ones and refused ones included, except for calls that would have blocked an I/O thread; ordered by
  /// cause.
  std::vector<Failures> failures;
  std::uint64_t objects = 0;  ///< That were transferred, those of failed operations included.
  std::uint64_t bytes = 0;    ///< Of these objects.
  LatencyHistogram latency;   ///< From the call to the end, of the operations that succeeded.

  [[nodiscard]] std::uint64_t failed() const noexcept;
  [[nodiscard]] std::uint64_t in_flight() const noexcept { return started - succeeded - failed(); }
};

/// Counts the bytes over one lane (TCP: the connections of that number, of all peers) or rail (RDMA: a port of a device).
struct PathStats {
  std::string name;  ///< "lane 0", "rail 1 mlx5_0:1"
  /// Bytes that this side moved out and in, the transport's own included. TCP: all that went through the sockets once
  /// they were a lane, which leaves out the greetings. RDMA: what this side's work requests wrote or sent, and read;
  /// what peers write and read is seen by them alone.
  std::uint64_t bytes_out = 0;
  std::uint64_t bytes_in = 0;
};

/// Counts the connections over one road of an `AutoTransferChannel`.
struct RoadStats {
  std::string name;
  std::uint64_t taken = 0;  ///< Connections, asked for by either side.
  /// Connections among these for which no better road was possible, for another reason than that the peer is on another
  /// host.
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
  std::uint64_t reconnected = 0;  ///< How many of both were to a peer that had been connected before.
  std::vector<CauseCount> failed;   ///< Attempts of this side that failed; ordered by cause.
  std::vector<CauseCount> refused;  ///< Attempts of others that were refused or didn't get through; ordered by cause.
};

/// One peer that the channel knows.
struct PeerStats {
  std::string id;
  bool connected = false;
  std::uint64_t connects = 0;   ///< Connections that there were to it, the present one included.
  std::uint64_t succeeded = 0;  ///< Operations.
  std::uint64_t failed = 0;     ///< Operations that had got as far as its connection, or to a wait for it.
  std::uint64_t bytes = 0;      ///< Of the objects that were transferred.
};

/// A snapshot of what a channel has done. Its numbers are counted one by one while the channel works, so those of
/// operations that are just ending may be in some and not yet in others; `in_flight()` is never less than none.
struct ChannelStats {
  std::string transport;
  std::size_t connected_peers = 0;
  /// Connects that were refused with `errc::identity_conflict`, here or by the peer: two channels have the same id.
  std::uint64_t identity_conflicts = 0;
  /// How often somebody else was found where a known peer was: it restarted, or moved.
  std::uint64_t peer_replacements = 0;
  /// How often bytes that have landed on this side differed from what was sent (`TransferSpec::checksums`): objects, and those of
  /// more than 1 MiB, or over RDMA of more than 4,096 blocks, by their parts.
  std::uint64_t checksum_mismatches = 0;
  HandshakeStats handshakes;
  /// Connections to the channel's ports that were closed, and messages that were turned away, before their sender was
  /// known: they make no sense, weren't finished in time, or were too many. Ordered by cause.
  std::vector<CauseCount> refused_strangers;
  std::vector<PeerStats> peers;  ///< Ordered by id. A peer that was forgotten (`ChannelOptions::max_peers`) is not here any more.
  std::size_t pending_notifications = 0;  ///< That wait for `receive_notification`.
  std::array<TransferStats, 4> transfers;  ///< By `TransferKind`.
  std::vector<PathStats> paths;
  std::vector<RoadStats> roads;  ///< Of an `AutoTransferChannel`, the best first.
  /// Further labels of the Prometheus text, for programs with several channels. `stats()` leaves them out.
  std::map<std::string, std::string> labels;

  [[nodiscard]] const TransferStats& of(TransferKind kind) const {
    return transfers.at(static_cast<std::size_t>(kind));
  }
};

/// The statistics of a program's channels in Prometheus' text format, version 0.0.4: to be answered with the content
/// type `text/plain; version=0.0.4`. The label `cause` is the error's `error_name`. Counters are named
/// `kvferry_..._total`, durations are in seconds, sizes in bytes. Channels of the same transport need `labels` that
/// tell them apart.
/// @throws TransferError `std::errc::invalid_argument` for a label name that Prometheus forbids or kvferry uses itself.
///   Source: https://prometheus.io/docs/instrumenting/exposition_formats/
[[nodiscard]] KVFERRY_EXPORT std::string to_prometheus(std::span<const ChannelStats> channels);
[[nodiscard]] KVFERRY_EXPORT std::string to_prometheus(const ChannelStats& channel);

}  // namespace kvferry

#endif  // KVFERRY_CHANNEL_STATS_HPP
