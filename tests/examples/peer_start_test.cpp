// SPDX-License-Identifier: Apache-2.0
//
// How the peers start: options, addresses, and what they agree on.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <string>

#include "peer_pair.hpp"

namespace kvferry_test {
namespace {

/// An address that is taken by a socket which nobody listens at.
class DeafAddress {
 public:
  DeafAddress() : fd_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    if (fd_ < 0 || ::bind(fd_, generic, size) != 0 || ::getsockname(fd_, generic, &size) != 0) {
      throw std::runtime_error("no address for the test");
    }
    port_ = ntohs(address.sin_port);
  }
  DeafAddress(const DeafAddress&) = delete;
  DeafAddress& operator=(const DeafAddress&) = delete;
  ~DeafAddress() { ::close(fd_); }

  [[nodiscard]] std::string host_and_port() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  int fd_;
  int port_ = 0;
};

/// A peer that is to end without having started a transfer: with one line, which has `part` in it.
void expect_end(PeerProcess& peer, int code, const std::string& part) {
  EXPECT_EQ(peer.wait_for_exit(), code);
  EXPECT_EQ(own_lines_of(peer).size(), 1U) << peer.errors();
  EXPECT_NE(peer.errors().find(part), std::string::npos) << peer.errors();
}

TEST(PeerStart, PrefillReachesNobody) {
  const DeafAddress address;
  PrefillProcess prefill(address.host_and_port(), {"--tokens", "1", "--timeout", "1"});
  expect_end(prefill, 4, address.host_and_port());
}

TEST(PeerStart, DecodeFindsItsPortTaken) {
  const DecodeProcess first({"--tokens", "1"});
  PeerProcess second(program("decode_peer"), {"--tokens", "1", "--listen", first.url()});
  expect_end(second, 3, first.url().substr(first.url().find("//") + 2));
}

TEST(PeerStart, NobodyComesToDecode) {
  DecodeProcess decode({"--tokens", "1", "--accept-timeout", "0.1"});
  expect_end(decode, 4, "a cache has not come from prefill in 0.1 s");
}

TEST(PeerStart, DecodeIsInterruptedWhileItWaits) {
  DecodeProcess decode({"--tokens", "1"});
  decode.signal(SIGINT);
  expect_end(decode, 130, "interrupted by SIGINT");
}

TEST(PeerStart, PrefillIsInterruptedWhileItConnects) {
  const DeafAddress address;
  PrefillProcess prefill(address.host_and_port(), {"--tokens", "1"});
  prefill.wait_for_line("connecting to ");
  prefill.signal(SIGTERM);
  EXPECT_EQ(prefill.wait_for_exit(), 130);
  EXPECT_EQ(own_lines_of(prefill).back(), "prefill_peer: interrupted by SIGTERM");
}

TEST(PeerStart, ACacheThatIsTooLargeIsRefusedAndTheNextOneTaken) {
  DecodeProcess decode({"--tokens", "16"});
  PrefillProcess large(decode.url(), {"--tokens", "17"});
  expect_end(large, 4, "the cache has 34 pages, decode's pool 32");

  PrefillProcess fitting(decode.url(), {"--tokens", "16"});
  EXPECT_EQ(fitting.wait_for_exit(), 0) << fitting.errors();
  EXPECT_EQ(decode.wait_for_exit(), 0) << decode.errors();
}

TEST(PeerStart, PagesOfAnotherSizeAreRefused) {
  DecodeProcess decode({"--tokens", "16", "--page-size", "64K"});
  PrefillProcess prefill(decode.url(), {"--tokens", "16", "--page-size", "32K"});
  EXPECT_EQ(prefill.wait_for_exit(), 4);
  EXPECT_NE(prefill.errors().find("65536"), std::string::npos) << prefill.errors();
  EXPECT_NE(prefill.errors().find("32768"), std::string::npos) << prefill.errors();
}

TEST(PeerStart, AFileThatIsNotThere) {
  const TemporaryFolder folder;
  const DeafAddress address;
  PrefillProcess prefill(address.host_and_port(), {"--file", folder.file("missing")});
  expect_end(prefill, 7, folder.file("missing"));
}

TEST(PeerStart, AFileThatCannotBeWritten) {
  const TemporaryFolder folder;
  PeerPair peers({"--tokens", "1"}, {}, {"--output", folder.file("missing/arrived")});
  EXPECT_EQ(peers.prefill.wait_for_exit(), 0) << peers.prefill.errors();
  EXPECT_EQ(peers.decode.wait_for_exit(), 7);
  EXPECT_NE(peers.decode.errors().find("cannot write '" + folder.file("missing/arrived")), std::string::npos)
      << peers.decode.errors();
}

TEST(PeerStart, HelpShowsHowLargeACacheIs) {
  for (const auto* name : {"prefill_peer", "decode_peer"}) {
    PeerProcess peer(program(name), {"--help"});
    EXPECT_EQ(peer.wait_for_exit(), 0);
    EXPECT_NE(peer.output().find("2 x 32 x 8 x 128 x 2 = 131072 bytes a token"), std::string::npos) << peer.output();
    EXPECT_NE(peer.output().find("61 x (512 + 64) x 2 = 70272 bytes a token"), std::string::npos) << peer.output();
    EXPECT_NE(peer.output().find("Exit codes:"), std::string::npos) << peer.output();
    EXPECT_TRUE(peer.errors().empty()) << peer.errors();
  }
}

struct BadOptions {
  const char* test;
  const char* program;
  Arguments arguments;
  const char* complaint;
};

class PeerOptions : public testing::TestWithParam<BadOptions> {};

TEST_P(PeerOptions, AreRefusedInOneLine) {
  PeerProcess peer(program(GetParam().program), GetParam().arguments);
  expect_end(peer, 2, GetParam().complaint);
  EXPECT_TRUE(peer.output().empty()) << peer.output();
}

INSTANTIATE_TEST_SUITE_P(
    Bad, PeerOptions,
    testing::Values(BadOptions{"NoConnect", "prefill_peer", {}, "--connect"},
                    BadOptions{"NoUrl", "prefill_peer", {"--connect", "nowhere"}, "'nowhere' is not host:port"},
                    BadOptions{"Mode", "prefill_peer", {"--connect", "127.0.0.1:1", "--mode", "push"}, "push"},
                    BadOptions{"Transport",
                               "prefill_peer",
                               {"--connect", "127.0.0.1:1", "--transport", "carrier-pigeon"},
                               "'carrier-pigeon' is not available"},
                    BadOptions{"Batch", "prefill_peer", {"--connect", "127.0.0.1:1", "--batch", "0"}, "--batch"},
                    BadOptions{"NoSuchByte",
                               "prefill_peer",
                               {"--connect", "127.0.0.1:1", "--tokens", "1", "--corrupt-byte", "131072"},
                               "131072 is not in a cache of 131072 bytes"},
                    BadOptions{"Model", "decode_peer", {"--model", "gpt-2"}, "'gpt-2' is not one of llama-3.1-8b"},
                    BadOptions{"Tokens", "decode_peer", {"--tokens", "many"}, "--tokens"},
                    BadOptions{"PageSize", "decode_peer", {"--page-size", "0"}, "--page-size"},
                    BadOptions{"Depth", "decode_peer", {"--depth", "-1"}, "--depth"},
                    BadOptions{"Timeout", "decode_peer", {"--timeout", "0"}, "--timeout"},
                    BadOptions{"Listen", "decode_peer", {"--listen", "5600"}, "'5600' is not host:port"},
                    BadOptions{"DecodeTransport",
                               "decode_peer",
                               {"--transport", "carrier-pigeon"},
                               "'carrier-pigeon' is not available"},
                    BadOptions{"Unknown", "decode_peer", {"--fast"}, "--fast"}),
    [](const auto& options) { return options.param.test; });

/// The script's arguments are looked at before anything is installed or built.
TEST(RunPeerPair, RefusesBadArgumentsInOneLine) {
  const std::string script = KVFERRY_TEST_DATA_DIR "/../examples/run-peer-pair.sh";
  struct Case {
    Arguments arguments;
    int code;
    const char* complaint;
  };
  for (const auto& [arguments, code, complaint] :
       {Case{{"--transport", "carrier-pigeon"}, 2, "tcp, rdma or auto, not 'carrier-pigeon'"}, Case{{"--fast", "yes"}, 2, "no option '--fast'"},
        Case{{"--tokens"}, 2, "--tokens needs a value"}, Case{{"--file=/nowhere/at/all"}, 7, "/nowhere/at/all"}}) {
    PeerProcess run(script, arguments);
    expect_end(run, code, complaint);
  }
}

TEST(RunPeerPair, ExplainsItself) {
  PeerProcess run(KVFERRY_TEST_DATA_DIR "/../examples/run-peer-pair.sh", {"--help"});
  EXPECT_EQ(run.wait_for_exit(), 0);
  EXPECT_NE(run.output().find("--transport NAME"), std::string::npos);
}

}  // namespace
}  // namespace kvferry_test
