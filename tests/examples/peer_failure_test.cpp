// SPDX-License-Identifier: Apache-2.0
//
// A peer whose other side is interrupted, killed or stopped in the middle of a transfer.

#include <gtest/gtest.h>

#include <csignal>
#include <cstddef>
#include <string>

#include "peer_pair.hpp"

namespace kvferry_test {
namespace {

/// 8 MiB in 128 batches, two of them a second: the transfer takes longer than any test.
const Arguments slow_cache{"--tokens", "64", "--max-rate", "128K"};
const Arguments page_by_page{"--batch", "1"};

/// Besides what it is doing, a peer says on stderr why it ended, in one line.
std::string only_error(const PeerProcess& peer) {
  std::string error;
  std::size_t count = 0;
  for (const auto& line : own_lines_of(peer)) {
    if (line.find(" in 128 pages") == std::string::npos) {
      error = line;
      ++count;
    }
  }
  EXPECT_EQ(count, 1U) << peer.errors();
  return error;
}

class PeerFailure : public testing::TestWithParam<const char*> {
 protected:
  explicit PeerFailure(const Arguments& common = {})
      : peers_(slow_cache + common, page_by_page + Arguments{"--mode", GetParam()}) {
    peers_.prefill.wait_for_line(" in 128 pages");
    peers_.decode.wait_for_line(" in 128 pages");
  }

  void expect_interrupted(PeerProcess& peer, const std::string& signal) {
    EXPECT_EQ(peer.wait_for_exit(), 130);
    EXPECT_NE(only_error(peer).find("interrupted by " + signal), std::string::npos) << peer.errors();
  }

  /// The other peer's end is noticed long before any time-out.
  void expect_peer_lost(PeerProcess& peer, const std::string& lost) {
    EXPECT_EQ(peer.wait_for_exit(), 5);
    EXPECT_NE(only_error(peer).find(lost), std::string::npos) << peer.errors();
  }

  PeerPair peers_;
};

TEST_P(PeerFailure, PrefillInterrupted) {
  peers_.prefill.signal(SIGINT);
  expect_interrupted(peers_.prefill, "SIGINT");
  expect_peer_lost(peers_.decode, "prefill");
}

TEST_P(PeerFailure, DecodeInterrupted) {
  peers_.decode.signal(SIGINT);
  expect_interrupted(peers_.decode, "SIGINT");
  expect_peer_lost(peers_.prefill, "decode");
}

TEST_P(PeerFailure, BothTerminated) {
  peers_.prefill.signal(SIGTERM);
  peers_.decode.signal(SIGTERM);
  // Each may learn of its own signal or of the other's end first.
  const auto prefill = peers_.prefill.wait_for_exit();
  const auto decode = peers_.decode.wait_for_exit();
  EXPECT_TRUE(prefill == 130 || prefill == 5) << prefill;
  EXPECT_TRUE(decode == 130 || decode == 5) << decode;
  EXPECT_TRUE(prefill == 130 || decode == 130);
}

TEST_P(PeerFailure, PrefillKilled) {
  peers_.prefill.signal(SIGKILL);
  expect_peer_lost(peers_.decode, "prefill");
}

TEST_P(PeerFailure, DecodeKilled) {
  peers_.decode.signal(SIGKILL);
  expect_peer_lost(peers_.prefill, "decode");
}

INSTANTIATE_TEST_SUITE_P(Modes, PeerFailure, testing::Values("write", "read", "sendrecv"),
                         [](const auto& mode) { return mode.param; });

/// A peer that hangs keeps its connections open: only the time-out helps.
class PeerHang : public PeerFailure {
 protected:
  PeerHang() : PeerFailure({"--timeout", "3", "--connect-timeout", "60"}) {}
};

TEST_P(PeerHang, PrefillStopped) {
  peers_.prefill.signal(SIGSTOP);
  EXPECT_EQ(peers_.decode.wait_for_exit(), 5);
  EXPECT_FALSE(only_error(peers_.decode).empty());
}

TEST_P(PeerHang, DecodeStopped) {
  peers_.decode.signal(SIGSTOP);
  EXPECT_EQ(peers_.prefill.wait_for_exit(), 5);
  EXPECT_FALSE(only_error(peers_.prefill).empty());
}

INSTANTIATE_TEST_SUITE_P(Modes, PeerHang, testing::Values("write", "read", "sendrecv"),
                         [](const auto& mode) { return mode.param; });

}  // namespace
}  // namespace kvferry_test
