// SPDX-License-Identifier: Apache-2.0
// The peer pair over RDMA, as run-peer-pair.sh --transport rdma starts it.
#include <gtest/gtest.h>

#include <string>

#include "examples/peer_pair.hpp"

namespace kvferry_test {
namespace {

class RdmaExchange : public testing::TestWithParam<const char*> {};

TEST_P(RdmaExchange, MovesACache) {
  const Arguments common{"--transport", "rdma", "--tokens", "64"};
  Exchange exchange(common, common + Arguments{"--mode", GetParam()});
  EXPECT_EQ(exchange.wait_for_exit(), 0) << exchange.errors();
  EXPECT_NE(exchange.output().find(std::string("mode ") + GetParam() + ", path rdma "), std::string::npos)
      << exchange.output();
  EXPECT_NE(exchange.output().find("decode_peer: checksum XXH3-128"), std::string::npos) << exchange.output();
}

INSTANTIATE_TEST_SUITE_P(Modes, RdmaExchange, testing::Values("write", "read", "sendrecv"),
                         [](const auto& mode) { return mode.param; });

}  // namespace
}  // namespace kvferry_test
