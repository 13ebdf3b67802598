// SPDX-License-Identifier: Apache-2.0
// `close` and its waits, and links that break at the wrong moment.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <latch>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

TEST(OptionsOfTheKit, ChecksumsThatTheTransportHasNotAreRefusedByTheConstructor) {
  ChannelOptions options;
  options.checksums = true;
  try {
    const TestChannel made(options, [](const auto&) { return std::make_shared<KeepingLink>(); });
    FAIL() << "it was made";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::not_supported);
    EXPECT_NE(std::string(error.what()).find("'test'"), std::string::npos) << error.what();
  }
}

/// "a" connects to "b", over links of the test's at "a".
class LinksOfATest : public ::testing::Test {
 protected:
  void make(const TestChannel::MakeLink& make_link) {
    ChannelOptions options;
    options.regions = {{memory_.data(), memory_.size(), memory_.size()}};
    options.peer_init_url = kvferry::testing::own_loopback_url();
    b_.emplace(options, [](const auto&) { return std::make_shared<KeepingLink>(); });
    options.peer_init_url.clear();
    a_.emplace(options, make_link);
  }
  [[nodiscard]] std::future<void> connect() {
    return std::async(std::launch::async, [this] { a_->lazy_init_peer_connection("a", "b", b_->peer_init_url()); });
  }
  [[nodiscard]] std::future<std::size_t> write() {
    return a_->async_batched_write({ConstBuffer(memory_.data(), memory_.size())},
                                   {.peer_id = "b", .remote_indexes = page_}, asio::use_future);
  }
  [[nodiscard]] std::future<void> close() {
    return std::async(std::launch::async, [this] { a_->close(); });
  }

  std::vector<std::byte> memory_ = std::vector<std::byte>(4096);
  const std::vector<std::uint64_t> page_{0};
  std::optional<TestChannel> b_;
  std::optional<TestChannel> a_;
};

/// Longer than it takes to close a channel that waits for nothing.
constexpr std::chrono::milliseconds a_while{100};

class Closing : public LinksOfATest {};

/// Ends its operations on another thread, when that gets round to it.
class LateLink final : public KeepingLink {
 public:
  void start(std::shared_ptr<Operation> operation) override {
    KeepingLink::start(std::move(operation));
    started.count_down();
  }
  void shut(std::error_code, const std::string&) override { is_shut.count_down(); }

  std::latch started{1};
  std::latch is_shut{1};
};

TEST_F(Closing, LastsUntilTheLastOperationHasEnded) {
  const auto link = std::make_shared<LateLink>();
  make([link](const auto&) { return link; });
  connect().get();
  auto written = write();
  link->started.wait();
  auto closed = close();
  link->is_shut.wait();
  EXPECT_EQ(closed.wait_for(a_while), std::future_status::timeout);
  link->end_all(errc::closed, "the channel was closed");
  closed.get();
  EXPECT_THROW(written.get(), std::system_error);
}

/// Calls a function of the test's instead of moving anything.
class CallingLink final : public KeepingLink {
 public:
  void start(std::shared_ptr<Operation> operation) override { on_start(std::move(operation)); }

  std::function<void(std::shared_ptr<Operation>)> on_start;
};

class BreakingLinks : public LinksOfATest {};

// An operation has the second link made, and meets its end there, while the channel hands over what has waited for that
// link; another operation comes before or after that is known.
TEST_F(BreakingLinks, WhatComesWhileOneBreaksAtItsHandOverGetsAnother) {
  for (const bool before : {false, true}) {
    std::vector<std::shared_ptr<CallingLink>> links;
    std::vector<std::shared_ptr<LinkHost>> hosts;
    std::future<std::size_t> second;
    make([&](std::shared_ptr<LinkHost> host) {
      hosts.push_back(std::move(host));
      links.push_back(std::make_shared<CallingLink>());
      if (links.size() == 2) {
        links.back()->on_start = [&](const auto& operation) {
          if (before) {
            second = write();
          }
          hosts[1]->link_failed(*links[1], errc::connection_lost);
          if (!before) {
            second = write();
          }
          operation->finish(errc::connection_lost);
        };
      } else {
        links.back()->on_start = [](const auto& operation) {
          operation->landed(0, 1);
          operation->finish({});
        };
      }
      return links.back();
    });
    connect().get();
    hosts[0]->link_failed(*links[0], errc::connection_lost);
    auto first = write();
    EXPECT_THROW(first.get(), std::system_error);
    EXPECT_EQ(second.get(), 1U);
    EXPECT_EQ(links.size(), 3U);
    EXPECT_EQ(a_->dials(), 3);
    a_.reset();
  }
}

// The connection breaks between two of those who have waited for it.
TEST_F(BreakingLinks, AConnectByMetadataHasAPeerOrAnError) {
  std::vector<std::shared_ptr<CallingLink>> links;
  std::vector<std::shared_ptr<LinkHost>> hosts;
  std::future<std::size_t> second;
  std::future<PeerInfo> connected;
  std::function<void(std::shared_ptr<Operation>)> on_start;
  make([&](std::shared_ptr<LinkHost> host) {
    hosts.push_back(std::move(host));
    links.push_back(std::make_shared<CallingLink>());
    links.back()->on_start = [&](const auto& operation) { on_start(operation); };
    return links.back();
  });
  connect().get();
  const PeerInfo info = a_->connect("a", b_->local_metadata("b"));
  EXPECT_EQ(info.id, "b");
  EXPECT_EQ(info.incarnation, a_->peer_info("b")->incarnation);
  EXPECT_EQ(info.path, "nowhere");
  hosts[0]->link_failed(*links[0], errc::connection_lost);
  int started = 0;
  on_start = [&](const std::shared_ptr<Operation>& operation) {
    if (++started == 1) {
      second = write();
      connected = a_->async_connect("a", b_->local_metadata("b"), {}, asio::use_future);
      operation->landed(0, 1);
      operation->finish({});
    } else {
      hosts[1]->link_failed(*links[1], errc::connection_lost);
      operation->finish(errc::connection_lost);
    }
  };
  EXPECT_EQ(write().get(), 1U);
  EXPECT_THROW(second.get(), std::system_error);
  try {
    EXPECT_EQ(connected.get().id, "b");
    ADD_FAILURE() << "connected to a peer that is gone";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::connection_lost);
  }
  a_.reset();
}

}  // namespace
}  // namespace kvferry::kit::tests
