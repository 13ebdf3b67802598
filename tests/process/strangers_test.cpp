// SPDX-License-Identifier: Apache-2.0
// Strangers that become peers and hold their connections leave descriptors to those whom the user has named, and to whoever
// comes after them.
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "common/process_figures.hpp"
#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::ProcessFigures;
using kvferry::testing::Program;

constexpr rlim_t descriptors = 256;
constexpr int strangers = 400;

/// A process whose one channel connects to the url that it is told, under very many names.
class StrangersProcess {
 public:
  StrangersProcess() {
    std::array<int, 2> there{};
    std::array<int, 2> back{};
    if (::pipe(there.data()) != 0 || ::pipe(back.data()) != 0 || (process_ = ::fork()) == -1) {
      std::abort();
    }
    if (process_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      std::string url(64, '\0');
      url.resize(static_cast<std::size_t>(std::max<ssize_t>(::read(there[0], url.data(), url.size()), 0)));
      Node node(1, {}, false);
      for (int i = 0; i < strangers; ++i) {
        std::error_code ignored;
        node.channel->lazy_init_peer_connection("stranger-" + std::to_string(i), "hub-" + std::to_string(i), url, {},
                                                {}, ignored);
      }
      (void)!::write(back[1], "x", 1);
      ::pause();
    }
    to_ = there[1];
    from_ = back[0];
  }
  StrangersProcess(const StrangersProcess&) = delete;
  StrangersProcess& operator=(const StrangersProcess&) = delete;
  ~StrangersProcess() {
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }

  void connect_to(const std::string& url) const {
    char done = 0;
    (void)!::write(to_, url.data(), url.size());
    (void)!::read(from_, &done, 1);
  }

 private:
  pid_t process_ = -1;
  int to_ = -1;
  int from_ = -1;
};

int failed(const char* what, const std::error_code& ec) {
  std::fprintf(stderr, "%s: %s\n", what, ec.message().c_str());
  return 1;
}

}  // namespace

KVFERRY_PROGRAM(strangers_hold_their_connections) {
  const StrangersProcess others;
  ::setrlimit(RLIMIT_NOFILE, std::array<rlimit, 1>{{{descriptors, descriptors}}}.data());
  Node hub(2);
  const std::string url = hub.channel->peer_init_url();
  Node honest(2, {}, false);
  const auto write = [&](Node& from) {
    std::error_code ec;
    from.channel->batched_write({ConstBuffer(from.memory.data(), page_size)},
                                {.peer_id = "hub", .remote_indexes = std::array<std::uint64_t, 1>{0}}, ec);
    return ec;
  };
  honest.channel->lazy_init_peer_connection("honest", "hub", url);
  if (const auto ec = write(honest)) {
    return failed("before", ec);
  }
  others.connect_to(url);
  const std::size_t held = ProcessFigures::of().descriptors;
  std::printf("%zu descriptors of %zu, %zu peers\n", held, std::size_t{descriptors}, hub.channel->stats().peers.size());
  if (const auto ec = write(honest)) {
    return failed("a peer that was connected, and has written", ec);
  }
  if (hub.channel->stats().handshakes.reconnected != 0) {
    return failed("a peer that has written lost its connection", {});
  }
  std::error_code ec;
  Node newcomer(2, {}, false);
  newcomer.channel->lazy_init_peer_connection("newcomer", "hub", url, {}, {}, ec);
  if (ec || (ec = write(newcomer))) {
    return failed("a newcomer", ec);
  }
  Node named(2);
  hub.channel->lazy_init_peer_connection("hub", "named", named.channel->peer_init_url(), {}, {}, ec);
  if (ec) {
    return failed("a peer that the user names", ec);
  }
  return 0;
}

KVFERRY_PROGRAM(descriptors_are_raised_later) {
  constexpr std::size_t many = 40;
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit few{64, limit.rlim_max};
  ::setrlimit(RLIMIT_NOFILE, &few);
  Node hub(2);
  ::setrlimit(RLIMIT_NOFILE, &limit);
  std::vector<std::unique_ptr<Node>> peers;
  while (peers.size() < many) {
    peers.push_back(std::make_unique<Node>(2, TcpOptions{}, false));
    peers.back()->channel->lazy_init_peer_connection("peer-" + std::to_string(peers.size()), "hub",
                                                     hub.channel->peer_init_url());
  }
  for (const auto& peer : peers) {
    std::error_code ec;
    peer->channel->batched_write({ConstBuffer(peer->memory.data(), page_size)},
                                 {.peer_id = "hub", .remote_indexes = std::array<std::uint64_t, 1>{0}}, ec);
    if (ec) {
      return failed("a peer of many", ec);
    }
  }
  return hub.channel->stats().connected_peers == many ? 0 : failed("not all are connected", {});
}

namespace {

TEST(StrangersLinks, AreAsManyAsDescriptorsAllowByThen) {
  const auto ended = Program::run("descriptors_are_raised_later");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

TEST(StrangersLinks, LeaveDescriptorsToOthers) {
  const auto ended = Program::run("strangers_hold_their_connections");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

}  // namespace
}  // namespace kvferry::tcp::testing
