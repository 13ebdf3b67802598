// SPDX-License-Identifier: Apache-2.0
// Two hosts joined by links: packets that are lost, late and out of order, and a host that is switched off. The program
// runs on both: on host 0 the tests, on host 1 their peer. The last test ends host 1.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <future>
#include <string_view>

#include <kvferry/testing/test_watchdog.hpp>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

using std::chrono::milliseconds;

constexpr std::size_t count = 512;
/// All that one test may wait, on either host, for the other to come included: it is no sum of waits that each have a
/// limit. Less than the limit of its process, so that the test can say what it waited for.
class Budget {
 public:
  /// The time that is left for a wait; `what` names it. Throws if there is none left.
  [[nodiscard]] milliseconds left(const std::string& what) const {
    const auto left = std::chrono::duration_cast<milliseconds>(end_ - std::chrono::steady_clock::now());
    if (left <= milliseconds(0)) {
      throw std::runtime_error(used_up(what));
    }
    return left;
  }
  /// The same for one of several tries.
  [[nodiscard]] milliseconds one_try(const std::string& what) const {
    return std::min(left(what), kvferry::testing::scaled(std::chrono::seconds(20)));
  }

  /// Does what waits no longer than `left`; if it fails, the failure says what was waited for.
  template <class Wait>
  auto wait(const std::string& what, Wait wait) const {
    try {
      return wait(left(what));
    } catch (const std::system_error& error) {
      throw std::runtime_error("waiting for " + what + ": " + error.what());
    }
  }

  template <class Result>
  void wait(const std::string& what, const std::future<Result>& future) const {
    if (future.wait_for(left(what)) != std::future_status::ready) {
      throw std::runtime_error(used_up(what));
    }
  }

 private:
  [[nodiscard]] static std::string used_up(const std::string& what) {
    return "the time of the test is used up, " + std::to_string(kvferry::testing::scaled(limit).count()) +
           " ms, waiting for " + what;
  }

  static constexpr std::chrono::seconds limit{110};
  const std::chrono::steady_clock::time_point end_ = std::chrono::steady_clock::now() + kvferry::testing::scaled(limit);
};

std::string environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? std::string() : value;
}

bool is_peer() { return environment("KVFERRY_GUEST") == "1"; }

void run(const std::string& command) {
  if (std::system(command.c_str()) != 0) {
    ADD_FAILURE() << command;
  }
}

/// netem on this host's way out to the other, for as long as this lives.
class Disturbance {
 public:
  explicit Disturbance(const std::string& how) { run("tc qdisc replace dev eth0 root netem " + how); }
  Disturbance(const Disturbance&) = delete;
  Disturbance& operator=(const Disturbance&) = delete;
  ~Disturbance() { run("tc qdisc del dev eth0 root"); }
};

NodeOptions patient(std::size_t rails, const Budget& budget) {
  NodeOptions options;
  options.rails = rails;
  options.channel.default_timeout = budget.left("a channel");
  options.channel.handshake_timeout = budget.left("a channel");
  options.channel.stripe_threshold = 64 * page_size;
  return options;
}

/// The address of the peer's channel in the test that is running.
std::string url(const char* address_variable) {
  const std::string name = ::testing::UnitTest::GetInstance()->current_test_info()->name();
  // Each test has a port of its own, so that none meets the peer of another.
  const std::size_t port = 20'000 + std::hash<std::string>()(name) % 10'000;
  return "tcp://" + environment(address_variable) + ":" + std::to_string(port);
}

ConstBuffer bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

/// The tags of the n-th try to have a batch echoed.
std::uint64_t tag_there(std::uint64_t attempt) { return 2 * attempt; }
std::uint64_t tag_back(std::uint64_t attempt) { return 2 * attempt + 1; }

/// Serves until the other host says that it is done: on a number receives a batch and sends it back.
void serve(std::size_t rails) {
  const Budget budget;
  auto options = patient(rails, budget);
  options.channel.peer_init_url = url("KVFERRY_RAIL0");
  Node peer(count, std::move(options));
  int words = 0;
  for (;;) {
    const Notification told = budget.wait("the tester's next word, after " + std::to_string(words++),
                                          [&](milliseconds left) { return peer.channel->receive_notification(left); });
    if (std::ranges::equal(told.payload, bytes("end"))) {
      return;
    }
    const std::string number(reinterpret_cast<const char*>(told.payload.data()), told.payload.size());
    const std::uint64_t attempt = std::stoull(number);
    std::vector<std::byte> memory(count * page_size);
    const MutableBuffer all(memory);
    std::error_code ec;
    const auto one_try = [&] { return budget.one_try("batch " + number); };
    peer.channel->batched_recv({all}, {.peer_id = told.peer_id, .tag = tag_there(attempt), .timeout = one_try()}, ec);
    if (!ec) {
      peer.channel->batched_send({ConstBuffer(all)},
                                 {.peer_id = told.peer_id, .tag = tag_back(attempt), .timeout = one_try()}, ec);
    }
    EXPECT_TRUE(!ec || ec == condition::retryable) << ec.message();
  }
}

class Tester {
 public:
  explicit Tester(std::size_t rails) : node_(count, options(rails, budget_)) {
    budget_.wait("the other host", [&](milliseconds left) {
      return node_.channel->lazy_init_peer_connection("tester", "peer", url("KVFERRY_PEER_RAIL0"), {},
                                                      {.timeout = left});
    });
  }

  [[nodiscard]] Node& node() { return node_; }
  [[nodiscard]] const Budget& budget() const { return budget_; }

  /// All kinds of transfer, there and back. A network that is bad enough breaks connections: then calls say that they
  /// may be made again, and are, until they succeed.
  void expect_transfers(unsigned seed) {
    const auto all = indexes(count);
    TransferSpec pages{.peer_id = "peer", .remote_indexes = all};
    node_.fill(seed);
    const std::vector<std::byte> sent(node_.region.begin(), node_.region.end());
    expect_done("a write", [&](std::error_code& ec, milliseconds one_try) {
      pages.timeout = one_try;
      node_.channel->batched_write(node_.pages(count), pages, ec);
    });
    node_.fill(std::byte{0});
    expect_done("a read", [&](std::error_code& ec, milliseconds one_try) {
      pages.timeout = one_try;
      node_.channel->batched_read(node_.pages(count), pages, ec);
    });
    EXPECT_TRUE(std::ranges::equal(node_.region, sent));

    std::vector<std::byte> back(sent.size());
    expect_done("a batch sent there and back", [&](std::error_code& ec, milliseconds one_try) {
      const std::uint64_t attempt = ++attempts_;
      tell(std::to_string(attempt));
      node_.channel->batched_send({ConstBuffer(sent)},
                                  {.peer_id = "peer", .tag = tag_there(attempt), .timeout = one_try}, ec);
      if (!ec) {
        node_.channel->batched_recv({MutableBuffer(back)},
                                    {.peer_id = "peer", .tag = tag_back(attempt), .timeout = one_try}, ec);
      }
    });
    EXPECT_EQ(back, sent);
  }

  void tell(std::string_view command) {
    const std::uint64_t last = count - 1;
    expect_done("the word " + std::string(command), [&](std::error_code& ec, milliseconds one_try) {
      node_.channel->batched_write({node_.page(last)},
                                   {.peer_id = "peer",
                                    .remote_indexes = std::span(&last, 1),
                                    .timeout = one_try,
                                    .notification = bytes(command)},
                                   ec);
    });
  }

  /// How often a call had to be made again.
  [[nodiscard]] int failures() const { return failures_; }

 private:
  static NodeOptions options(std::size_t rails, const Budget& budget) {
    auto options = patient(rails, budget);
    options.listens = false;
    return options;
  }

  template <class Call>
  void expect_done(const std::string& what, Call call) {
    std::error_code error;
    do {
      const std::string waited_for = what + (error ? ", which failed: " + error.message() : std::string());
      call(error, budget_.one_try(waited_for));
      EXPECT_TRUE(!error || error == condition::retryable) << what << ": " << error.message();
      failures_ += error ? 1 : 0;
    } while (error && error == condition::retryable);
  }

  const Budget budget_;
  Node node_;
  std::uint64_t attempts_ = 0;
  int failures_ = 0;
};

void expect_transfers_with(const std::string& disturbance, std::size_t rails = 1) {
  if (is_peer()) {
    serve(rails);
    return;
  }
  Tester tester(rails);
  {
    const Disturbance netem(disturbance);
    for (unsigned round = 0; round < 3; ++round) {
      tester.expect_transfers(round);
    }
  }
  ::testing::Test::RecordProperty("calls_made_again", tester.failures());
  tester.tell("end");
}

TEST(RdmaTwoHosts, NothingDisturbed) { expect_transfers_with("delay 0ms", 2); }

TEST(RdmaTwoHosts, PacketsAreLost) { expect_transfers_with("loss 1%"); }

TEST(RdmaTwoHosts, PacketsAreLate) { expect_transfers_with("delay 3ms"); }

TEST(RdmaTwoHosts, PacketsOvertakeEachOther) { expect_transfers_with("delay 1ms reorder 95% 50%"); }

TEST(RdmaTwoHosts, PacketsAreLostLateAndOvertakeEachOther) {
  expect_transfers_with("delay 1ms 0.2ms loss 0.5% reorder 95% 50%");
}

TEST(RdmaTwoHosts, ARailThatIsDownIsLeftOut) {
  if (is_peer()) {
    serve(2);
    return;
  }
  const auto second = first_rails(2)[1].device;
  Tester tester(2);
  const auto path = [&] { return tester.node().channel->peer_info("peer").value_or(PeerInfo{}).path; };
  tester.expect_transfers(1);
  EXPECT_NE(path().find(second), std::string::npos) << path();
  run("sysctl -q -w net.ipv6.conf.eth1.keep_addr_on_down=1; ip link set eth1 down");
  // The rail's operations end with an error that may be tried again. The next ones go over the other rail.
  const auto all = indexes(count);
  std::error_code error;
  do {
    const milliseconds one_try =
        tester.budget().one_try("a path without " + second + ": " + error.message() + " " + path());
    tester.node().channel->batched_write(tester.node().pages(count),
                                         {.peer_id = "peer", .remote_indexes = all, .timeout = one_try}, error);
    ASSERT_TRUE(!error || error == condition::retryable) << error.message();
  } while (error || path().find(second) != std::string::npos);
  const auto before = tester.node().channel->rails().at(1).bytes_written;
  tester.expect_transfers(2);
  EXPECT_EQ(tester.node().channel->rails().at(1).bytes_written, before);
  run("ip link set eth1 up");
  tester.tell("end");
}

// The last one: host 1 does not come back.
TEST(RdmaTwoHosts, TheOtherHostIsSwitchedOffInTheMiddleOfABatch) {
  if (is_peer()) {
    serve(1);
    return;
  }
  Tester tester(1);
  Node& node = tester.node();
  node.fill(1);
  tester.expect_transfers(1);
  const std::vector<std::byte> sent(node.region.begin(), node.region.end());
  const auto all = indexes(count);
  std::vector<std::byte> outside(std::size_t{1} << 20);
  auto receiving =
      node.channel->async_batched_recv({MutableBuffer(outside)}, {.peer_id = "peer", .tag = 77}, asio::use_future);
  // One after the other without an end, until the host is gone.
  auto writing = std::async(std::launch::async, [&] {
    std::error_code ec;
    while (!ec) {
      node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = all}, ec);
    }
    return ec;
  });
  std::ofstream(environment("KVFERRY_SHARE") + "/power-off-1") << "now\n";
  tester.budget().wait("the end of the writes to a host that is off", writing);
  const auto error = writing.get();
  EXPECT_EQ(error, condition::peer_failed) << error.message();
  EXPECT_EQ(error, condition::retryable) << error.message();
  tester.budget().wait("the end of the recv from a host that is off", receiving);
  try {
    receiving.get();
    ADD_FAILURE() << "received from nobody";
  } catch (const std::system_error& failed) {
    EXPECT_EQ(failed.code(), condition::peer_failed) << failed.what();
  }
  EXPECT_TRUE(std::ranges::equal(node.region, sent));
  // The next call tries to reconnect, and says by its deadline that nobody is there.
  std::error_code again;
  node.channel->batched_write(node.pages(1),
                              {.peer_id = "peer", .remote_indexes = indexes(1), .timeout = milliseconds(1000)}, again);
  EXPECT_TRUE(again == condition::peer_failed || again == condition::timed_out) << again.message();
}

}  // namespace
}  // namespace kvferry::rdma::testing
