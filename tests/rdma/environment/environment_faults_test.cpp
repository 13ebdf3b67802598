// SPDX-License-Identifier: Apache-2.0
// Faults of the machine: a link that goes down, a peer that is stopped, memory that can't be registered.
#include <gtest/gtest.h>

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <asio/use_future.hpp>

#include <cstdlib>
#include <fstream>
#include <future>
#include <sstream>

#include <kvferry/testing/peer_process.hpp>

#include "rdma/environment/network_device.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

using kvferry::testing::LineSocket;
using kvferry::testing::PeerProcess;
using std::chrono::milliseconds;

NodeOptions impatient() {
  NodeOptions options;
  options.channel.ack_timeout = std::chrono::milliseconds(60);
  options.channel.handshake_timeout = long_enough;
  options.channel.default_timeout = long_enough;
  return options;
}

TEST(RdmaEnvironment, ALinkThatGoesDownAndUpInTheMiddleOfABatch) {
  if (!may_change_links()) {
    GTEST_SKIP() << "not in a virtual machine: the link is somebody's";
  }
  constexpr std::size_t count = 8192;
  Node node(count, impatient());
  Node peer(count, impatient());
  node.fill(1);
  node.connect("node", "peer", peer);
  const auto all = indexes(count);
  for (int round = 0; round < 3; ++round) {
    SCOPED_TRACE(round);
    peer.fill(std::byte{0});
    const NetworkDevice link(first_rails(1)[0]);
    std::vector<std::error_code> statuses(count);
    std::vector<MutableBuffer> pages = node.pages(count);
    auto write = node.channel->async_batched_write(
        pages, {.peer_id = "peer", .remote_indexes = all, .statuses = statuses}, asio::use_future);
    // In the middle: pages come in order.
    ASSERT_TRUE(eventually([&] { return same(peer.page(count / 8), node.page(count / 8)); }));
    link.set_down();
    if (round == 0) {
      link.set_up();  // at once: the adapters send again
    }
    ASSERT_EQ(write.wait_for(long_enough), std::future_status::ready);
    std::size_t done = 0;
    std::error_code error;
    try {
      done = write.get();
    } catch (const std::system_error& failed) {
      error = failed.code();
    }
    if (error) {
      EXPECT_EQ(error, condition::peer_failed) << error.message();
      EXPECT_EQ(error, condition::retryable) << error.message();
    } else {
      EXPECT_EQ(done, count);
    }
    // The objects that are said to have landed have.
    for (std::size_t i = 0; i < count; ++i) {
      if (!statuses[i]) {
        ASSERT_TRUE(same(peer.page(i), node.page(i))) << i;
      }
    }
    link.set_up();
    // The port may take its time. What is tried meanwhile says that it may be tried again.
    std::error_code again;
    EXPECT_TRUE(eventually([&] {
      node.channel->batched_write(node.pages(count), {.peer_id = "peer", .remote_indexes = all}, again);
      EXPECT_TRUE(!again || again == condition::retryable) << again.message();
      return !again;
    }));
    EXPECT_TRUE(same(node, peer));
  }
}

TEST(RdmaEnvironment, APortThatGoesDownIsNoticedThoughNothingIsUnderWay) {
  if (!may_change_links()) {
    GTEST_SKIP() << "not in a virtual machine: the link is somebody's";
  }
  const auto trusting = [] {
    NodeOptions options = impatient();
    options.channel.keepalive_interval = milliseconds(0);
    return options;
  };
  Node node(4, trusting());
  Node peer(4, trusting());
  node.connect("node", "peer", peer);
  const NetworkDevice link(first_rails(1)[0]);
  link.set_down();
  EXPECT_TRUE(eventually([&] { return !node.channel->remote_xfer_handler_exists("peer"); }));
  EXPECT_TRUE(eventually([&] { return !peer.channel->remote_xfer_handler_exists("node"); }));
}

/// Buffers that a stopped peer, once it goes on, would write to if it could.
void expect_quiet_after_deadline(Node& node, PeerProcess& process, MutableBuffer buffer, std::uint64_t tag) {
  EXPECT_EQ(process.ask("send " + std::to_string(tag) + " " + std::to_string(buffer.size())), "started");
  process.stop();
  std::error_code ec;
  const auto began = std::chrono::steady_clock::now();
  node.channel->batched_recv({buffer}, {.peer_id = "peer", .tag = tag, .timeout = milliseconds(300)}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  EXPECT_LT(std::chrono::steady_clock::now() - began, long_enough);
  std::ranges::fill(buffer, std::byte{0x5a});
  process.resume();
  // It finds the recv, and its send meets it, or finds that the recv is gone. Afterwards a send meets its recv again.
  EXPECT_EQ(process.ask("end"), "ended");
  EXPECT_TRUE(std::ranges::all_of(buffer, [](std::byte byte) { return byte == std::byte{0x5a}; }));
  EXPECT_EQ(process.ask("send " + std::to_string(tag + 1) + " 100"), "started");
  EXPECT_EQ(node.channel->batched_recv({node.page(0)}, {.peer_id = "peer", .tag = tag + 1, .timeout = long_enough}),
            1U);
  EXPECT_EQ(process.ask("end"), "ended");
  EXPECT_TRUE(std::ranges::all_of(buffer, [](std::byte byte) { return byte == std::byte{0x5a}; }));
}

/// A peer that sends what it is told, and ends it when it is told.
void serve_sends() {
  LineSocket line = PeerProcess::line_to_starter();
  Node peer(512, impatient());
  line.write_line(peer.channel->peer_init_url());
  std::vector<std::byte> memory(std::size_t{1} << 20, std::byte{0x77});
  std::future<std::size_t> send;
  while (const auto command = line.read_line(long_enough)) {
    std::istringstream words(*command);
    std::string verb;
    std::uint64_t tag = 0;
    std::size_t size = 0;
    words >> verb >> tag >> size;
    if (verb == "send") {
      send = peer.channel->async_batched_send({ConstBuffer(memory).first(size)},
                                              {.peer_id = "node", .tag = tag, .timeout = milliseconds(3000)},
                                              asio::use_future);
      line.write_line("started");
    } else {
      send.wait();
      line.write_line("ended");
    }
  }
}

void expect_stopped_peer_reaches_no_buffer(NodeOptions options) {
  if (PeerProcess::is_peer()) {
    serve_sends();
    return;
  }
  PeerProcess process(long_enough);
  const std::string url = process.next_line();
  Node node(512, std::move(options));
  node.channel->lazy_init_peer_connection("node", "peer", url);
  // In a region that peers may write to; outside of every region, large; the same, small.
  expect_quiet_after_deadline(node, process, node.region.last(256 * page_size), 1);
  std::vector<std::byte> outside(std::size_t{1} << 20);
  expect_quiet_after_deadline(node, process, outside, 3);
  expect_quiet_after_deadline(node, process, MutableBuffer(outside).first(1000), 5);
  EXPECT_TRUE(process.finish());
}

TEST(RdmaEnvironment, APeerThatIsStoppedBeyondTheDeadlineReachesNoBuffer) {
  expect_stopped_peer_reaches_no_buffer(impatient());
}

TEST(RdmaEnvironment, APeerThatIsStoppedBeyondTheDeadlineReachesNoBufferOfAChannelThatPolls) {
  NodeOptions options = impatient();
  options.channel.poll = PollPolicy::always();
  // Nothing but the operation itself has a timer.
  options.channel.keepalive_interval = milliseconds(0);
  expect_stopped_peer_reaches_no_buffer(std::move(options));
}

/// Takes the right to lock any amount of memory from this process, and allows so much.
void limit_locked_memory(std::size_t bytes) {
  const rlimit limit{bytes, bytes};
  ASSERT_EQ(::setrlimit(RLIMIT_MEMLOCK, &limit), 0);
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2]{};
  ASSERT_EQ(::syscall(SYS_capget, &header, data), 0);
  data[0].effective &= ~(1U << CAP_IPC_LOCK);
  data[0].permitted &= ~(1U << CAP_IPC_LOCK);
  ASSERT_EQ(::syscall(SYS_capset, &header, data), 0);
}

TEST(RdmaEnvironment, MemoryThatMayNotBeLockedIsNamed) {
  if (!PeerProcess::is_peer()) {
    PeerProcess process(long_enough);  // in a process of its own: there is no way back
    EXPECT_EQ(process.next_line(), "done");
    EXPECT_TRUE(process.finish());
    return;
  }
  constexpr std::size_t allowed = std::size_t{16} << 20;
  limit_locked_memory(allowed);
  // Large enough for the C library to map it, and so to give it back.
  std::vector<std::byte> large(4 * allowed);
  try {
    RdmaOptions options;
    options.rails = first_rails(1);
    options.regions = {{large.data(), large.size(), page_size}};
    const RdmaTransferChannel channel(options);
    ADD_FAILURE() << "registered " << large.size() << " bytes";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory) << error.what();
    const std::string what = error.what();
    for (const std::string& part : {std::string("region 0"), std::to_string(large.size()), std::string("ulimit -l")}) {
      EXPECT_NE(what.find(part), std::string::npos) << what;
    }
  }

  Node a(64, impatient());
  Node b(64, impatient());
  a.fill(3);
  a.connect("a", "b", b);
  // An operation whose objects can't be registered ends, and harms no other.
  const MutableBuffer object(large);
  std::string diagnostic;
  auto recv =
      a.channel->async_batched_recv({object}, {.peer_id = "b", .tag = 1, .diagnostic = &diagnostic}, asio::use_future);
  try {
    recv.get();
    ADD_FAILURE() << "received into memory that can't be registered";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory) << diagnostic;
    EXPECT_NE(diagnostic.find(std::to_string(object.size())), std::string::npos) << diagnostic;
  }
  EXPECT_EQ(a.channel->batched_write(a.pages(64), {.peer_id = "b", .remote_indexes = indexes(64)}), 64U);
  EXPECT_TRUE(std::ranges::equal(a.region, b.region));
  PeerProcess::line_to_starter().write_line("done");
}

}  // namespace
}  // namespace kvferry::rdma::testing
