// SPDX-License-Identifier: Apache-2.0
// A channel as LMCache's own kind of client meets it: line 1 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <string>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

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

TEST(HandshakeFaults, Line01_AListenerOfLmcachesSurvivesAConnect) {
  test::LmcachePeer peer("listener");
  const std::string url = peer.read_line();
  ASSERT_TRUE(url.starts_with("tcp://")) << url;
  Node node(1);
  for (int i = 0; i < 2; ++i) {
    std::string diagnostic;
    std::error_code ec;
    node.channel->lazy_init_peer_connection("me", "lmcache", url, {}, {.diagnostic = &diagnostic}, ec);
    EXPECT_EQ(ec, errc::handshake_failed) << diagnostic;
    EXPECT_NE(diagnostic.find("LMCache"), std::string::npos) << diagnostic;
  }
  const auto answer = node.channel->send_init_side_msg(url, encode_side_message(P2PInitSideMsg{}));
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(answer).peer_lookup_url, test::peer_lookup_url);
  EXPECT_EQ(peer.read_line(), "ok");
  EXPECT_EQ(peer.exit_status(), 0);
}

TEST(HandshakeFaults, Line01_WhatNeedsNoLookupUrlIsAnsweredAsByLmcache) {
  const Node node(1);
  Node asking(1);
  const auto lookup = asking.channel->send_init_side_msg(node.channel->peer_init_url(), encode_side_message(P2PInitSideMsg{}));
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(lookup).peer_lookup_url, "");
}

}  // namespace
}  // namespace kvferry::tcp::testing
