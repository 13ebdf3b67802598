// SPDX-License-Identifier: Apache-2.0
//
// The peer pair as its users meet it: two programs, their output, and their exit codes.

#include <gtest/gtest.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <initializer_list>
#include <random>
#include <string>
#include <tuple>

#include "peer_pair.hpp"

namespace kvferry_test {
namespace {

const Arguments small_cache{"--model", "qwen2.5-7b", "--tokens", "100"};  // 5.7 MB in 175 pages

std::string random_bytes(std::size_t size) {
  std::mt19937_64 random(size + 1);
  std::string bytes(size, '\0');
  for (auto& byte : bytes) {
    byte = static_cast<char>(random());
  }
  return bytes;
}

std::string checksum_in(PeerProcess& peer) {
  const auto line = peer.wait_for_line("checksum XXH3-128 ");
  return line.substr(line.find("XXH3-128 ") + 9, 32);
}

class PeerPairMode : public testing::TestWithParam<const char*> {
 protected:
  [[nodiscard]] static Arguments mode() { return {"--mode", GetParam()}; }
};

TEST_P(PeerPairMode, MovesAGeneratedCache) {
  PeerPair peers(small_cache, mode());
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();

  const std::string moved = "moved 5734400 bytes in 175 pages, ";
  EXPECT_NE(peers.prefill.output().find(moved), std::string::npos) << peers.prefill.output();
  EXPECT_NE(peers.decode.output().find(moved), std::string::npos) << peers.decode.output();
  EXPECT_NE(peers.prefill.output().find(std::string(" GB/s, mode ") + GetParam() + ", path tcp "), std::string::npos)
      << peers.prefill.output();
  EXPECT_EQ(checksum_in(peers.prefill), checksum_in(peers.decode));
}

TEST(PeerPair, TakesTheBestRoadOfThisHost) {
  PeerPair peers(small_cache + Arguments{"--transport", "auto"});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();
  EXPECT_NE(peers.prefill.output().find("path shm process "), std::string::npos) << peers.prefill.output();
}

TEST_P(PeerPairMode, LogsThroughSpdlogWhatItIsToldTo) {
  PeerPair peers(small_cache + Arguments{"--log", "info"}, mode());
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();
  for (const PeerProcess* const peer : std::initializer_list<const PeerProcess*>{&peers.prefill, &peers.decode}) {
    EXPECT_NE(peer->errors().find("] [kvferry] [info] peer_connected transport=tcp peer=\"" +
                                  std::string(peer == &peers.prefill ? "decode" : "prefill") + "\": "),
              std::string::npos)
        << peer->errors();
  }
}

TEST_P(PeerPairMode, MovesManySmallPagesOverSeveralLanes) {
  PeerPair peers({"--model", "deepseek-v3", "--tokens", "30", "--page-size", "100", "--lanes", "3", "--depth", "7"},
                 mode() + Arguments{"--batch", "1000"});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();
  EXPECT_NE(peers.prefill.output().find("moved 2108160 bytes in 21082 pages, "), std::string::npos)
      << peers.prefill.output();
}

TEST_P(PeerPairMode, AByteThatChangedOnTheWayIsNoticedByBoth) {
  PeerPair peers(small_cache, mode(), {"--corrupt-byte", "5734399"});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 6);
  EXPECT_EQ(peers.decode.wait_for_exit(), 6);
  EXPECT_NE(peers.prefill.errors().find("prefill_peer: checksum mismatch: "), std::string::npos);
  EXPECT_NE(peers.decode.errors().find("decode_peer: checksum mismatch: "), std::string::npos);
}

TEST_P(PeerPairMode, AByteThatChangedBeforeItLeftIsNoticedByBoth) {
  TemporaryFolder folder;
  PeerPair peers(small_cache, mode() + Arguments{"--corrupt-byte", "0"}, {"--output", folder.file("arrived")});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 6);
  EXPECT_EQ(peers.decode.wait_for_exit(), 6);
  EXPECT_FALSE(std::filesystem::exists(folder.file("arrived")));
}

INSTANTIATE_TEST_SUITE_P(Modes, PeerPairMode, testing::Values("write", "read", "sendrecv"),
                         [](const auto& mode) { return mode.param; });

class PeerPairFile : public testing::TestWithParam<std::tuple<const char*, std::size_t>> {};

TEST_P(PeerPairFile, ArrivesByteForByte) {
  const auto [mode, size] = GetParam();
  TemporaryFolder folder;
  const auto content = random_bytes(size);
  write_file(folder.file("sent"), content);
  PeerPair peers({"--page-size", "4K", "--depth", "3"}, {"--mode", mode, "--batch", "5", "--file", folder.file("sent")},
                 {"--pool-size", "1M", "--output", folder.file("arrived")});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();
  EXPECT_TRUE(std::filesystem::exists(folder.file("arrived")));
  EXPECT_TRUE(read_file(folder.file("arrived")) == content);
}

INSTANTIATE_TEST_SUITE_P(ModesAndSizes, PeerPairFile,
                         testing::Combine(testing::Values("write", "read", "sendrecv"),
                                          testing::Values(0, 1, 4095, 4096, 4097, 20'480, 777'777, 1 << 20)),
                         [](const auto& file) {
                           return std::string(std::get<0>(file.param)) + "_" + std::to_string(std::get<1>(file.param));
                         });

TEST(ExchangeScript, MovesACacheAndShowsWhatBothPeersSay) {
  Exchange exchange(small_cache, small_cache);
  EXPECT_EQ(exchange.wait_for_exit(), 0) << exchange.errors();
  for (const auto* part : {"prefill_peer: moved 5734400 bytes", "decode_peer: moved 5734400 bytes", "decode_peer: checksum XXH3-128"}) {
    EXPECT_NE(exchange.output().find(part), std::string::npos) << part << " in " << exchange.output();
  }
}

TEST(ExchangeScript, MakesKeysAndThrowsThemAway) {
  const TemporaryFolder temporary;
  ASSERT_EQ(::setenv("TMPDIR", temporary.file("").c_str(), 1), 0);
  Exchange exchange(small_cache, small_cache, {"--secure", KVFERRY_TOOLS_DIR "/kvferry-keygen"});
  const int code = exchange.wait_for_exit();
  ::unsetenv("TMPDIR");
  EXPECT_EQ(code, 0) << exchange.errors();
  EXPECT_TRUE(std::filesystem::is_empty(temporary.file("")));
}

TEST(ExchangeScript, EndsWithTheCodeOfThePeerThatFailed) {
  Exchange corrupt(small_cache + Arguments{"--corrupt-byte", "7"}, small_cache);
  EXPECT_EQ(corrupt.wait_for_exit(), 6) << corrupt.errors();
  Exchange refused(small_cache, {"--tokens", "many"});
  EXPECT_EQ(refused.wait_for_exit(), 2) << refused.errors();
  Exchange nowhere(Arguments{"--listen", "nowhere"}, small_cache);
  EXPECT_EQ(nowhere.wait_for_exit(), 2) << nowhere.errors();
}

TEST(ExchangeScript, TakesBothPeersAlongWhenItIsInterrupted) {
  Exchange exchange(small_cache, small_cache + Arguments{"--batch", "5", "--depth", "1", "--max-rate", "100K"});
  exchange.wait_for_line("prefill_peer: writing");
  exchange.signal(SIGTERM);
  // Its output ends when the last one that holds it is gone.
  EXPECT_EQ(exchange.wait_for_exit(), 143);
}

TEST(PeerPair, OneThatIsSecuredTakesNoOtherThatIsNot) {
  const TemporaryFolder folder;
  const std::string keygen = KVFERRY_TOOLS_DIR "/kvferry-keygen";
  const std::string key = folder.file("key");
  const std::string peers = folder.file("peers");
  ASSERT_EQ(::system(("'" + keygen + "' '" + key + "' prefill > '" + peers + "'").c_str()), 0);
  DecodeProcess decode(small_cache + Arguments{"--key", key, "--peer-keys", peers, "--timeout", "5"});
  PrefillProcess prefill(decode.url(), small_cache);
  EXPECT_EQ(prefill.wait_for_exit(), 4) << prefill.errors();
  EXPECT_NE(prefill.errors().find("has no keyring"), std::string::npos) << prefill.errors();
}

TEST(PeerPair, ListensEverywhereAndIsReachedAtWhatItAdvertises) {
  PeerPair peers(small_cache, {}, {"--listen", "*:0", "--advertise", "localhost:0"});
  EXPECT_NE(peers.decode.url().find("localhost:"), std::string::npos) << peers.decode.url();
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 0) << peers.decode.errors();
}

TEST(PeerPair, DrawsABarOnATerminal) {
  DecodeProcess decode(small_cache);
  PrefillProcess prefill(decode.url(), small_cache, PeerProcess::Errors::terminal);
  EXPECT_EQ(prefill.wait_for_exit(), 0) << prefill.errors();
  EXPECT_EQ(decode.wait_for_exit(), 0) << decode.errors();
  EXPECT_NE(prefill.errors().find("[........................................]   0%"), std::string::npos) << prefill.errors();
  EXPECT_NE(prefill.errors().find("[########################################] 100%"), std::string::npos) << prefill.errors();
  EXPECT_EQ(decode.errors().find('#'), std::string::npos) << "a pipe gets a plain line: " << decode.errors();
}

}  // namespace
}  // namespace kvferry_test
