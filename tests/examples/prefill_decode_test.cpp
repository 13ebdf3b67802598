// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <csignal>
#include <string>

#include "examples/peer_process.hpp"

namespace kvferry_test {
namespace {

TEST(PrefillDecode, ThePagesOfSeveralRequestsOfSeveralDecodersAreRight) {
  PeerProcess prefill(KVFERRY_EXAMPLES_DIR "/prefill", {"tcp://127.0.0.1:0"});
  const std::string url = url_in(prefill.wait_for_line("prefill waits at"));
  for (int time = 0; time < 2; ++time) {  // the second one under the same id
    PeerProcess decode(KVFERRY_EXAMPLES_DIR "/decode", {url});
    EXPECT_EQ(decode.wait_for_exit(), 0) << decode.errors();
    EXPECT_EQ(decode.output(),
              "request 1: 6 of 6 pages are right\nrequest 2: 10 of 10 pages are right\n"
              "request 3: 16 of 16 pages are right\n");
  }
  prefill.signal(SIGKILL);
  EXPECT_EQ(prefill.wait_for_exit(), 128 + SIGKILL) << prefill.errors();
}

TEST(PrefillDecode, SayThatNobodyIsThere) {
  PeerProcess prefill(KVFERRY_EXAMPLES_DIR "/prefill", {"tcp://127.0.0.1:0"});
  const std::string url = url_in(prefill.wait_for_line("prefill waits at"));
  PeerProcess second(KVFERRY_EXAMPLES_DIR "/prefill", {url});
  EXPECT_EQ(second.wait_for_exit(), 1);
  EXPECT_NE(second.errors().find("prefill: "), std::string::npos) << second.errors();
  PeerProcess decode(KVFERRY_EXAMPLES_DIR "/decode", {"127.0.0.1"});
  EXPECT_EQ(decode.wait_for_exit(), 1);
  EXPECT_NE(decode.errors().find("decode: "), std::string::npos) << decode.errors();
}

}  // namespace
}  // namespace kvferry_test
