// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <string>

#include "examples/peer_process.hpp"

namespace kvferry_test {
namespace {

const std::string hello_pages = KVFERRY_EXAMPLES_DIR "/hello_pages";

TEST(HelloPages, ArriveWithTheirContentBeforeTheNotification) {
  PeerProcess decode(hello_pages, {"decode", "tcp://127.0.0.1:0"});
  PeerProcess prefill(hello_pages, {"prefill", url_in(decode.wait_for_line("decode waits at"))});
  EXPECT_EQ(prefill.wait_for_exit(), 0) << prefill.errors();
  EXPECT_EQ(decode.wait_for_exit(), 0) << decode.errors();
  EXPECT_NE(prefill.output().find("4 pages written\n"), std::string::npos) << prefill.output();
  EXPECT_NE(decode.output().find("prefill says: the pages of request 1 are there\n"
                                 "page 5 starts with 40\npage 7 starts with 41\n"
                                 "page 8 starts with 42\npage 11 starts with 43\n"),
            std::string::npos)
      << decode.output();
}

TEST(HelloPages, SayWhatIsWrongWithAnAddress) {
  PeerProcess prefill(hello_pages, {"prefill", "127.0.0.1"});
  EXPECT_EQ(prefill.wait_for_exit(), 1);
  EXPECT_NE(prefill.errors().find("127.0.0.1"), std::string::npos) << prefill.errors();
}

TEST(HelloPages, SayHowTheyAreUsed) {
  PeerProcess nobody(hello_pages, {});
  EXPECT_EQ(nobody.wait_for_exit(), 2);
  EXPECT_NE(nobody.errors().find("usage:"), std::string::npos) << nobody.errors();
}

}  // namespace
}  // namespace kvferry_test
