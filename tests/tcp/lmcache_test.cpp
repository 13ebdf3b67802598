// SPDX-License-Identifier: Apache-2.0
// A channel as LMCache's own kind of client meets it: line 1 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <string>

#include "channel_pair.hpp"
#include "core/lmcache_messages.hpp"
#include "core/lmcache_peer.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

TEST(HandshakeFaults, Line01_Line02_AChannelAnswersAnLmcachePeerAsLmcacheDoes) {
  TcpOptions options;
  options.peer_lookup_url = test::peer_lookup_url;
  const Node node(1, options);
  test::LmcachePeer peer("client " + node.channel->peer_init_url());
  EXPECT_EQ(peer.read_line(), "ok");
  EXPECT_EQ(peer.exit_status(), 0);
}

}  // namespace
}  // namespace kvferry::tcp::testing
