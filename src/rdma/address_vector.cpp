// SPDX-License-Identifier: Apache-2.0
#include "address_vector.hpp"

#include <cstring>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint8_t hop_limit = 64;

}  // namespace

ibv_ah_attr address_vector(const PortAddress& own, std::uint8_t port, const RailEndpoint& peers,
                           std::uint8_t service_level, std::uint8_t traffic_class) {
  ibv_gid peers_gid{};
  std::memcpy(peers_gid.raw, peers.gid.data(), sizeof(peers_gid.raw));
  ibv_ah_attr vector{};
  vector.port_num = port;
  vector.sl = service_level;
  vector.dlid = static_cast<std::uint16_t>(peers.lid);
  // InfiniBand needs no global route within its subnet, but for a virtual port, to and from which a LID alone doesn't lead.
  const bool is_virtual = own.needs_global_route || peers.global_route.value_or(0) != 0;
  const bool same_subnet = std::memcmp(peers_gid.raw, own.gid.raw, sizeof(peers_gid.raw) / 2) == 0;
  if (own.ethernet || peers.lid == 0 || !same_subnet || is_virtual) {
    vector.is_global = 1;
    vector.grh.dgid = peers_gid;
    vector.grh.sgid_index = static_cast<std::uint8_t>(own.gid_index);
    vector.grh.hop_limit = hop_limit;
    vector.grh.traffic_class = traffic_class;
  }
  return vector;
}

}  // namespace kvferry::rdma
