// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include <kvferry/memory_region.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// A region's place in its owner's memory, and the remote keys of its slices; no keys if peers may not reach it.
struct RegionKeys {
  std::uint64_t address = 0;
  std::uint64_t slice_bytes = 0;
  std::vector<std::uint32_t> keys;
  std::uint64_t number = 0;  ///< The region's.

  static constexpr std::string_view side_message_type = "RdmaRegion";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("address", &RegionKeys::address),
                      side_message_field("slice_bytes", &RegionKeys::slice_bytes),
                      side_message_field("keys", &RegionKeys::keys), side_message_field("number", &RegionKeys::number));
  }
};

/// A further queue pair of a rail: what it has that the rail's first one doesn't have as well.
struct FurtherQueuePair {
  std::uint64_t queue_pair = 0;
  std::uint64_t packet_number = 0;

  static constexpr std::string_view side_message_type = "RdmaQueuePair";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("queue_pair", &FurtherQueuePair::queue_pair),
                      side_message_field("packet_number", &FurtherQueuePair::packet_number));
  }
};

/// A queue pair, with all data that the peer needs to join it with one of its own.
struct RailEndpoint {
  std::uint64_t rail = 0;  ///< Its number; joined with the one of the same number.
  std::string link_layer;  ///< "Ethernet" or "InfiniBand"
  std::string gid_type;    ///< "RoCE v2", "RoCE v1" or "InfiniBand"
  Bytes gid;               ///< 16 bytes
  std::uint64_t lid = 0;
  std::uint64_t queue_pair = 0;
  std::uint64_t packet_number = 0;
  std::uint64_t mtu = 0;          ///< Bytes.
  std::uint64_t reads_taken = 0;  ///< How many RDMA reads of the peer it can have under way.
  std::uint64_t reads_made = 0;   ///< How many RDMA reads of its own it can have under way.
  std::uint64_t max_message = 0;  ///< Bytes in one work request.
  std::vector<RegionKeys> regions;  ///< Ordered by number.
  /// 1 if packets to it need a global route even within its subnet. None: they don't.
  std::optional<std::uint64_t> global_route = {};
  /// The rail's other queue pairs, each joined with the one of the same place. None: there aren't any.
  std::optional<std::vector<FurtherQueuePair>> further = {};

  static constexpr std::string_view side_message_type = "RdmaRail";
  static constexpr auto side_message_fields() {
    return std::tuple(
        side_message_field("rail", &RailEndpoint::rail), side_message_field("link_layer", &RailEndpoint::link_layer),
        side_message_field("gid_type", &RailEndpoint::gid_type), side_message_field("gid", &RailEndpoint::gid),
        side_message_field("lid", &RailEndpoint::lid), side_message_field("queue_pair", &RailEndpoint::queue_pair),
        side_message_field("packet_number", &RailEndpoint::packet_number),
        side_message_field("mtu", &RailEndpoint::mtu), side_message_field("reads_taken", &RailEndpoint::reads_taken),
        side_message_field("reads_made", &RailEndpoint::reads_made),
        side_message_field("max_message", &RailEndpoint::max_message),
        side_message_field("regions", &RailEndpoint::regions),
        side_message_field("global_route", &RailEndpoint::global_route),
        side_message_field("further", &RailEndpoint::further));
  }
};

/// A side's endpoint, in the handshake.
struct Endpoint {
  std::uint64_t message_bytes = 0;  ///< The size of a receive buffer.
  std::uint64_t messages = 0;       ///< Receive buffers of each rail, at most.
  std::vector<RailEndpoint> rails;
  /// How many unanswered messages with checksums it accepts on each rail. None: it has no checksums.
  std::optional<std::uint64_t> checks = {};
  /// How many of the receive buffers are posted at first; credits tell of the others when they are. None: all.
  std::optional<std::uint64_t> first_messages = {};

  static constexpr std::string_view side_message_type = "RdmaEndpoint";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("message_bytes", &Endpoint::message_bytes),
                      side_message_field("messages", &Endpoint::messages),
                      side_message_field("rails", &Endpoint::rails), side_message_field("checks", &Endpoint::checks),
                      side_message_field("first_messages", &Endpoint::first_messages));
  }
};

inline constexpr std::size_t max_rails = 16;
/// Of a rail.
inline constexpr std::size_t max_queue_pairs = 8;

/// How many queue pairs a rail has.
[[nodiscard]] inline std::size_t queue_pairs_of(const RailEndpoint& rail) noexcept {
  return 1 + (rail.further ? rail.further->size() : 0);
}
/// A queue pair of a rail, without the keys of regions. @param number less than `queue_pairs_of`; 0 is the first one.
[[nodiscard]] RailEndpoint queue_pair_of(const RailEndpoint& rail, std::size_t number);

/// Checks a region's keys against its description; empty if they match.
[[nodiscard]] std::string check_region_keys(const RegionKeys& keys, const RemoteRegion& region);

/// Checks a peer's endpoint against the regions that it described; empty if they match. Regions may come and go between
/// the description and the endpoint: a region without keys is removed, and keys without a description have no meaning
/// yet.
[[nodiscard]] std::string check_endpoint(const Endpoint& endpoint, std::span<const RemoteRegion> regions);

/// The limits of two joined queue pairs: the smaller of each side's.
struct Agreement {
  std::uint64_t mtu = 0;
  std::uint64_t reads_taken = 0;  ///< Of the peer's, at this side.
  std::uint64_t reads_made = 0;   ///< Of this side's, at the peer.
  std::uint64_t max_message = 0;
};
[[nodiscard]] Agreement agree(const RailEndpoint& own, const RailEndpoint& peers);

/// The reason why two queue pairs can't be joined, naming both values; empty if they can.
[[nodiscard]] std::string check_pairing(const RailEndpoint& own, const RailEndpoint& peers);

}  // namespace kvferry::rdma
