// SPDX-License-Identifier: Apache-2.0
// A handler of side messages that asks its own channel, which nobody else could answer meanwhile.
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/url.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Answers with what became of a message to a url.
class Asking final : public TcpTransferChannel {
 public:
  explicit Asking(TcpOptions options) : TcpTransferChannel(std::move(options)) {}
  ~Asking() override { close(); }

  std::string url;  ///< Empty: it asks nobody.
  std::error_code error;
  std::string why;

  SideMessage handle_init_side_msg(const SideMessage&) override {
    const std::string to = std::exchange(url, {});
    if (!to.empty()) {
      (void)send_init_side_msg(to, encode_side_message(P2PInitSideMsg{}),
                               {.timeout = std::chrono::minutes(10), .diagnostic = &why}, error);
    }
    return encode_side_message(PySocketInitResponse{"ok"});
  }
};

TcpOptions options_of_one_asked_at(std::string url) {
  TcpOptions options = kvferry_test::patient(TcpOptions());
  options.peer_init_url = std::move(url);
  return options;
}

void expect_would_deadlock(Asking& channel, const std::string& url) {
  TcpTransferChannel client{kvferry_test::patient(TcpOptions())};
  channel.url = url;
  const std::string reached = "tcp://127.0.0.1:" + std::to_string(parse_url(channel.peer_init_url()).port);
  const bool at_wildcard = parse_url(channel.peer_init_url()).is_wildcard();
  (void)client.send_init_side_msg(at_wildcard ? reached : channel.peer_init_url(),
                                  encode_side_message(P2PInitSideMsg{}));
  EXPECT_EQ(channel.error, errc::would_deadlock);
  EXPECT_NE(channel.why.find("its own channel"), std::string::npos) << channel.why;
}

TEST(OwnMessages, ThatAHandlerWouldWaitForAreRefused) {
  Asking channel(options_of_one_asked_at(kvferry::testing::own_loopback_url()));
  expect_would_deadlock(channel, channel.peer_init_url());
}

TEST(OwnMessages, OfAChannelAtAllAddressesAreRefusedAtThisHostsOwn) {
  Asking channel(options_of_one_asked_at("tcp://*:0"));
  const auto port = std::to_string(parse_url(channel.peer_init_url()).port);
  expect_would_deadlock(channel, "tcp://127.0.0.1:" + port);
  expect_would_deadlock(channel, "tcp://localhost:" + port);
}

TEST(OwnMessages, AreAnsweredToOtherThreadsAndThoseToOthersToTheHandler) {
  Asking channel(options_of_one_asked_at(kvferry::testing::own_loopback_url()));
  Asking other(options_of_one_asked_at(kvferry::testing::own_loopback_url()));
  channel.url = other.peer_init_url();
  const auto answer = channel.send_init_side_msg(channel.peer_init_url(), encode_side_message(P2PInitSideMsg{}));
  EXPECT_TRUE(answer.is<PySocketInitResponse>());
  EXPECT_FALSE(channel.error) << channel.why;
}

}  // namespace
}  // namespace kvferry::tcp::testing
