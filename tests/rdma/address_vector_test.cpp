// SPDX-License-Identifier: Apache-2.0
#include "rdma/address_vector.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

Bytes gid(unsigned char subnet, unsigned char host) {
  Bytes bytes(16);
  bytes[0] = std::byte{0xfe};
  bytes[7] = std::byte{subnet};
  bytes[15] = std::byte{host};
  return bytes;
}

PortAddress own_port(bool ethernet) {
  PortAddress own;
  own.ethernet = ethernet;
  own.lid = ethernet ? 0 : 7;
  own.gid_index = 3;
  const Bytes bytes = gid(1, 1);
  std::memcpy(own.gid.raw, bytes.data(), bytes.size());
  return own;
}

RailEndpoint peer(unsigned char subnet, std::uint64_t lid) {
  RailEndpoint endpoint;
  endpoint.gid = gid(subnet, 2);
  endpoint.lid = lid;
  return endpoint;
}

void expect_routed_by_gid(const ibv_ah_attr& vector, const RailEndpoint& to) {
  EXPECT_EQ(vector.is_global, 1);
  EXPECT_EQ(std::memcmp(vector.grh.dgid.raw, to.gid.data(), 16), 0);
  EXPECT_EQ(vector.grh.sgid_index, 3);
  EXPECT_EQ(vector.grh.traffic_class, 104);
  EXPECT_GT(vector.grh.hop_limit, 1);
}

TEST(AddressVector, Line21_RoceGoesByGid) {
  const auto to = peer(1, 0);
  const auto vector = address_vector(own_port(true), 2, to, 5, 104);
  expect_routed_by_gid(vector, to);
  EXPECT_EQ(vector.port_num, 2);
  EXPECT_EQ(vector.sl, 5);
}

TEST(AddressVector, Line21_InfiniBandGoesByLidWithinItsSubnet) {
  const auto vector = address_vector(own_port(false), 1, peer(1, 0x1234), 5, 104);
  EXPECT_EQ(vector.dlid, 0x1234);
  EXPECT_EQ(vector.is_global, 0);
}

TEST(AddressVector, Line21_InfiniBandGoesByGidWhereEitherPortIsVirtual) {
  for (const bool own_is_virtual : {true, false}) {
    auto to = peer(1, 0x1234);
    auto own = own_port(false);
    own.needs_global_route = own_is_virtual;
    if (!own_is_virtual) {
      to.global_route = 1;
    }
    const auto vector = address_vector(own, 1, to, 5, 104);
    EXPECT_EQ(vector.dlid, 0x1234);
    expect_routed_by_gid(vector, to);
  }
}

TEST(AddressVector, Line21_InfiniBandGoesByGidToAnotherSubnet) {
  const auto to = peer(9, 0x1234);
  const auto vector = address_vector(own_port(false), 1, to, 5, 104);
  EXPECT_EQ(vector.dlid, 0x1234);
  expect_routed_by_gid(vector, to);
}

}  // namespace
}  // namespace kvferry::rdma
