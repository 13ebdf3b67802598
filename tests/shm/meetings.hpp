// SPDX-License-Identifier: Apache-2.0
#pragma once

// Connecting, without a channel.
#include <gtest/gtest.h>

#include <sys/socket.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shm/meeting.hpp>

#include "common/patience.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {

/// An accepting side without a channel.
class Meetings : public ::testing::Test {
 protected:
  Meetings() {
    auto options = std::make_shared<MeetingOptions>();
    options->incarnation = 1;
    options->memory_traffic = std::make_shared<MemoryTraffic>();
    options->logger = std::make_shared<kit::Logger>();
    options->refusals = std::make_shared<kit::Refusals>(options->logger);
    options->link.lane.events = std::make_shared<tcp::SocketEvents>(context_.get_executor());
    options_ = options;
    meeting_ = std::make_shared<Meeting>(context_.get_executor(), options_,
                                         std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}),
                                         listen_at(endpoint_.name), true, endpoint_,
                                         [this](std::error_code ec, std::shared_ptr<kit::Link> link, std::string why) {
                                           link_ = std::move(link);
                                           why_ = std::move(why);
                                           ended_.set_value(ec);
                                         });
    meeting_->begin(attempts_, kit::Clock::now() + limit);
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Meetings() override {
    meeting_->fail(errc::closed, "the test ends");
    if (link_) {
      link_->shut(errc::closed, "the test ends");
    }
    options_->link.lane.events->close();
    work_.reset();
    thread_.join();
  }

  [[nodiscard]] Greeting hello() const {
    Greeting greeting;
    std::ranges::copy(endpoint_.dial_secret, greeting.secret.begin());
    return greeting;  // the incarnation of the harness's peer is 0
  }
  static void say(const Descriptor& socket, const Greeting& greeting) {
    EXPECT_EQ(::send(socket.get(), &greeting, sizeof(greeting), MSG_NOSIGNAL), ssize_t{sizeof(greeting)});
  }

  static constexpr std::chrono::seconds limit = kvferry_test::long_enough;
  const AcceptEndpoint endpoint_ = [] {
    AcceptEndpoint made{Bytes(name_bytes), Bytes(secret_bytes), Bytes(secret_bytes)};
    for (Bytes* bytes : {&made.name, &made.dial_secret, &made.accept_secret}) {
      tcp::Secret drawn{};
      make_secret(drawn);
      std::ranges::copy(drawn, bytes->begin());
    }
    return made;
  }();
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  kit::Attempts<Meeting> attempts_;
  std::shared_ptr<const MeetingOptions> options_;
  std::promise<std::error_code> ended_;
  std::string why_;  ///< Once it has ended.
  std::shared_ptr<kit::Link> link_;
  std::shared_ptr<Meeting> meeting_;
  std::thread thread_;
};

}  // namespace kvferry::shm::testing
