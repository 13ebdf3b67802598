// SPDX-License-Identifier: Apache-2.0
#include "endpoint.hpp"

#include <algorithm>
#include <array>

#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint64_t max_24_bits = (std::uint64_t{1} << 24) - 1;

/// Whether the GID stands for an IPv4 address: ::ffff:a.b.c.d.
bool is_ipv4(const Bytes& gid) {
  constexpr std::array<unsigned char, 12> prefix{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::ranges::equal(std::span(gid).first(prefix.size()), prefix, {},
                            [](std::byte byte) { return std::to_integer<unsigned char>(byte); });
}

std::string check_rail(const RailEndpoint& rail, std::span<const RemoteRegion> regions) {
  constexpr std::array<std::uint64_t, 5> mtus{256, 512, 1024, 2048, 4096};
  if (rail.rail >= max_rails || rail.gid.size() != 16 || rail.lid > 0xffff || rail.queue_pair > max_24_bits ||
      rail.packet_number > max_24_bits || std::ranges::find(mtus, rail.mtu) == mtus.end() || rail.reads_taken > 255 ||
      rail.reads_made > 255 || rail.max_message < max_message_bytes) {
    return "rail " + std::to_string(rail.rail) + " with queue pair " + std::to_string(rail.queue_pair) +
           ", packet number " + std::to_string(rail.packet_number) + ", lid " + std::to_string(rail.lid) + ", mtu " +
           std::to_string(rail.mtu) + ", largest request " + std::to_string(rail.max_message);
  }
  if (queue_pairs_of(rail) > max_queue_pairs) {
    return "rail " + std::to_string(rail.rail) + " with " + std::to_string(queue_pairs_of(rail)) +
           " queue pairs, at most " + std::to_string(max_queue_pairs);
  }
  for (std::size_t i = 1; i < queue_pairs_of(rail); ++i) {
    const FurtherQueuePair& further = (*rail.further)[i - 1];
    if (further.queue_pair > max_24_bits || further.packet_number > max_24_bits) {
      return "rail " + std::to_string(rail.rail) + " with further queue pair " + std::to_string(further.queue_pair) +
             ", packet number " + std::to_string(further.packet_number);
    }
  }
  for (std::size_t i = 0; i < rail.regions.size(); ++i) {
    const std::uint64_t number = rail.regions[i].number;
    if (i != 0 && number <= rail.regions[i - 1].number) {
      return "keys of region " + std::to_string(number) + " after those of region " +
             std::to_string(rail.regions[i - 1].number);
    }
    const auto described = std::ranges::find(regions, number, &RemoteRegion::number);
    if (described != regions.end()) {
      if (auto wrong = check_region_keys(rail.regions[i], *described); !wrong.empty()) {
        return wrong;
      }
    }
  }
  return {};
}

}  // namespace

RailEndpoint queue_pair_of(const RailEndpoint& rail, std::size_t number) {
  RailEndpoint one = rail;
  one.regions.clear();
  one.further.reset();
  if (number != 0) {
    const FurtherQueuePair& further = rail.further->at(number - 1);
    one.queue_pair = further.queue_pair;
    one.packet_number = further.packet_number;
  }
  return one;
}

std::string check_region_keys(const RegionKeys& keys, const RemoteRegion& region) {
  if (region.access == Access::none) {
    return keys.keys.empty() ? std::string() : "keys for a region that is closed";
  }
  if (keys.address + region.size < keys.address || keys.slice_bytes == 0) {
    return "a region of " + std::to_string(region.size) + " bytes at address " + std::to_string(keys.address) +
           " in slices of " + std::to_string(keys.slice_bytes);
  }
  const std::uint64_t slices = (region.size - 1) / keys.slice_bytes + 1;
  if (keys.keys.size() != slices) {
    return std::to_string(keys.keys.size()) + " keys for a region of " + std::to_string(slices) + " slices";
  }
  return {};
}

std::string check_endpoint(const Endpoint& endpoint, std::span<const RemoteRegion> regions) {
  if (endpoint.message_bytes < min_message_bytes || endpoint.message_bytes > max_message_bytes ||
      endpoint.messages < min_messages || endpoint.messages > max_messages) {
    return std::to_string(endpoint.messages) + " receive buffers of " + std::to_string(endpoint.message_bytes) +
           " bytes";
  }
  if (const auto& first = endpoint.first_messages;
      first && (*first < min_first_messages || *first > endpoint.messages)) {
    return std::to_string(*first) + " receive buffers at first, of " + std::to_string(endpoint.messages);
  }
  if (endpoint.rails.empty() || endpoint.rails.size() > max_rails) {
    return std::to_string(endpoint.rails.size()) + " rails, at least 1 and at most " + std::to_string(max_rails);
  }
  for (std::size_t i = 0; i < endpoint.rails.size(); ++i) {
    if (i != 0 && endpoint.rails[i].rail <= endpoint.rails[i - 1].rail) {
      return "rail " + std::to_string(endpoint.rails[i].rail) + " after rail " +
             std::to_string(endpoint.rails[i - 1].rail);
    }
    if (auto wrong = check_rail(endpoint.rails[i], regions); !wrong.empty()) {
      return wrong;
    }
  }
  return {};
}

Agreement agree(const RailEndpoint& own, const RailEndpoint& peers) {
  return {std::min(own.mtu, peers.mtu), std::min(own.reads_taken, peers.reads_made),
          std::min(own.reads_made, peers.reads_taken), std::min(own.max_message, peers.max_message)};
}

std::string check_pairing(const RailEndpoint& own, const RailEndpoint& peers) {
  const std::string rail = "rail " + std::to_string(own.rail) + ": ";
  if (own.link_layer != peers.link_layer) {
    return rail + "link layer '" + peers.link_layer + "', this side's is '" + own.link_layer + "'";
  }
  if (own.gid_type != peers.gid_type) {
    return rail + "GID type '" + peers.gid_type + "', this side's is '" + own.gid_type + "'";
  }
  if (own.link_layer == "Ethernet" && is_ipv4(own.gid) != is_ipv4(peers.gid)) {
    const auto family = [](const RailEndpoint& endpoint) { return is_ipv4(endpoint.gid) ? "IPv4" : "IPv6"; };
    return rail + "a GID of an " + family(peers) + " address, this side's is of an " + family(own) + " address";
  }
  // An adapter would take the first read and never make it.
  const Agreement agreed = agree(own, peers);
  if (agreed.reads_taken == 0 || agreed.reads_made == 0) {
    return rail + "takes " + std::to_string(peers.reads_taken) + " reads and makes " + std::to_string(peers.reads_made) +
           " at a time, this side takes " + std::to_string(own.reads_taken) + " and makes " + std::to_string(own.reads_made);
  }
  return {};
}

}  // namespace kvferry::rdma
