// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <string>

#include <kvferry/error.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message_codec.hpp>

#include "core/handshake_test_support.hpp"
#include "core/lmcache_messages.hpp"
#include "core/lmcache_peer.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using test::ask;
using test::get;
using test::HandshakeService;
using test::LmcachePeer;

/// Answers as LMCache does, and as it should: what it raises for becomes an error message.
SideMessage answer_like_lmcache(const SideMessage& request) {
  if (request.is<PySocketInitRequest>()) {
    EXPECT_EQ(decode_side_message<PySocketInitRequest>(request).peer_init_url, test::peer_init_url);
    return encode_side_message(PySocketInitResponse{"ok"});
  }
  if (request.is<P2PInitSideMsg>()) {
    return encode_side_message(P2PInitSideRetMsg{std::string(test::peer_lookup_url)});
  }
  throw TransferError(errc::unhandled_side_message, "no answer to a side message of type " + request.type());
}

TEST(HandshakeFaults, Line01_Line02_AnLmcachePeerIsAnsweredAsByLmcache) {
  const HandshakeService service(
      {.bind_url = "tcp://127.0.0.1:0"},
      [](const SideMessage& request, HandshakeService::Reply reply) { reply(answer_like_lmcache(request)); });
  LmcachePeer peer("client " + service.bound_url());
  EXPECT_EQ(peer.read_line(), "ok");
  EXPECT_EQ(peer.exit_status(), 0);
}

TEST(HandshakeFaults, Line01_AnLmcacheServerIsAskedAsByLmcache) {
  LmcachePeer peer("server");
  const auto url = peer.read_line();
  ASSERT_TRUE(url.starts_with("tcp://")) << url;

  HandshakeService client({}, nullptr);
  const auto handshake =
      get(ask(client, url, encode_side_message(PySocketInitRequest{std::string(test::peer_init_url)})));
  ASSERT_FALSE(handshake.ec) << handshake.diagnostic;
  EXPECT_EQ(decode_side_message<PySocketInitResponse>(handshake.message).status, "ok");
  EXPECT_EQ(test::to_hex(handshake.message.encoded()), test::py_socket_response_hex);

  const auto lookup = get(ask(client, url, encode_side_message(P2PInitSideMsg{})));
  ASSERT_FALSE(lookup.ec) << lookup.diagnostic;
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(lookup.message).peer_lookup_url, test::peer_lookup_url);

  EXPECT_EQ(peer.read_line(), "ok");
  EXPECT_EQ(peer.exit_status(), 0);
}

}  // namespace
}  // namespace kvferry
