// SPDX-License-Identifier: Apache-2.0
// RDMA's packets can't be encrypted by a program: where that is required, the owner has to vouch for the network.
#include <gtest/gtest.h>

#include <algorithm>
#include <string_view>
#include <system_error>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

TEST(RdmaEncryption, WhereItIsRequiredTheNetworkHasToBeTrusted) {
  NodeOptions options;
  options.channel.require_encryption = true;
  try {
    const Node node(1, options);
    FAIL() << "its pages would leave the host in the clear";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::invalid_argument) << error.what();
    EXPECT_NE(std::string_view(error.what()).find("'rdma' would move pages off this host unencrypted"),
              std::string_view::npos)
        << error.what();
  }
  options.channel.trusted_fabric = true;
  Node node(4, options);
  Node peer(4);
  node.connect("node", "peer", peer);
  node.fill(5);
  node.channel->batched_write(node.pages(4), {.peer_id = "peer", .remote_indexes = indexes(4)});
  EXPECT_TRUE(std::ranges::equal(node.region, peer.region));
}

}  // namespace
}  // namespace kvferry::rdma::testing
