// SPDX-License-Identifier: Apache-2.0
// Bytes in a lane's socket that nobody has looked at when something else happens.
#include <gtest/gtest.h>

#include <sys/ioctl.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "protocol_harness.hpp"
#include <kvferry/tcp/lane.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::Host;

class LaneLink final : public kit::Link {
 public:
  explicit LaneLink(Lane& lane) : lane_(lane) {}
  void start(std::shared_ptr<kit::Operation> operation) override {
    const std::size_t count = operation->object_count();
    lane_.start(std::make_shared<StripedOperation>(std::move(operation), 1), {0, count});
  }
  void stop(std::shared_ptr<kit::Operation> operation) override { lane_.stop(std::move(operation)); }
  void shut(std::error_code cause, const std::string& why) override { lane_.shut(cause, why); }
  [[nodiscard]] std::string path() const override { return "a test's"; }

 private:
  Lane& lane_;
};

/// A lane, of which the test is the peer. Nothing is read of its socket but when the test says so.
class LaneSocket : public ::testing::Test {
 protected:
  static constexpr std::size_t size = 64;

  LaneSocket() {
    tcp::acceptor acceptor(context_, {asio::ip::address_v4::loopback(), 0});
    tcp::socket near(context_);
    near.connect(acceptor.local_endpoint());
    acceptor.accept(peer_);
    descriptor_ = near.native_handle();
    lane_ = std::make_shared<Lane>(
        std::move(near), std::make_shared<Host>(std::vector<MemoryRegion>{{region_.data(), size, size}}),
        Lane::Options{std::chrono::seconds(1), std::make_shared<SocketEvents>(context_.get_executor()), {}},
        std::weak_ptr<Lane::Owner>());
    lane_->run({});
    link_ = std::make_shared<LaneLink>(*lane_);
  }
  ~LaneSocket() override {
    lane_->shut(errc::closed, "the test ends");
    lane_->disconnect();
    context_.poll();
  }

  std::shared_ptr<kit::Operation> start(TransferRequest request) {
    request.diagnostic = &diagnostic_;
    const auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([this](std::error_code ec, std::size_t count) {
          ++calls_;
          error_ = ec;
          count_ = count;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry_);
    EXPECT_FALSE(registry_->add(operation));
    operation->start_on(link_);
    return operation;
  }

  void say(const FrameHeader& header, std::span<const Descriptor> descriptors = {}) {
    const std::vector<std::byte> payload(header.payload_bytes, std::byte{7});
    const auto bytes = testing::frame_bytes(header, descriptors, payload);
    asio::write(peer_, asio::buffer(bytes));
    // The kernel may deliver it a little later.
    for (int come = 0; come < static_cast<int>(bytes.size());) {
      ASSERT_EQ(::ioctl(descriptor_, FIONREAD, &come), 0);
    }
  }

  /// Until the lane has noticed and its operation has ended.
  void reset_by_peer() {
    peer_.set_option(asio::socket_base::linger(true, 0));
    peer_.close();
    for (int i = 0; i < 1000 && calls_ == 0; ++i) {
      context_.run_one_for(std::chrono::seconds(10));
    }
    EXPECT_EQ(calls_, 1);
  }

  asio::io_context context_;
  std::vector<std::byte> region_ = std::vector<std::byte>(size);
  std::vector<std::byte> object_ = std::vector<std::byte>(size);
  tcp::socket peer_{context_};
  int descriptor_ = -1;  ///< The lane's.
  std::shared_ptr<Lane> lane_;
  std::shared_ptr<kit::Link> link_;
  std::shared_ptr<kit::OperationRegistry> registry_ =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context_.get_executor()), 16);
  int calls_ = 0;
  std::error_code error_;
  std::size_t count_ = 0;
  std::string diagnostic_;
};

TEST_F(LaneSocket, AnAnswerThatHasComeCountsThoughItsOperationIsGivenUpBeforeItIsRead) {
  const auto operation = start(testing::request(TransferKind::read, {MutableBuffer(object_)}, {0}));
  FrameHeader answer;
  answer.type = FrameType::read_data;
  answer.operation = 1;
  answer.payload_bytes = size;
  say(answer);
  ASSERT_EQ(calls_, 0);
  operation->request_stop(errc::cancelled);
  EXPECT_EQ(calls_, 1);
  EXPECT_FALSE(error_) << diagnostic_;
  EXPECT_EQ(count_, 1U);
  EXPECT_EQ(object_, std::vector(size, std::byte{7}));
}

TEST_F(LaneSocket, AWriteOfAPeerWhoHasResetTheConnectionIsNotPlaced) {
  start(testing::request(TransferKind::recv, {MutableBuffer(object_)}));
  FrameHeader write;
  write.operation = 1;
  write.count = 1;
  write.payload_bytes = size;
  const Descriptor descriptor{0, size};
  say(write, {&descriptor, 1});
  reset_by_peer();
  EXPECT_EQ(error_, condition::peer_failed) << error_.message();
  EXPECT_EQ(region_, std::vector<std::byte>(size)) << "its write has ended there, and may be done anew elsewhere";
}

TEST_F(LaneSocket, AResetIsNamedAsSuch) {
  start(testing::request(TransferKind::recv, {MutableBuffer(object_)}));
  reset_by_peer();
  EXPECT_EQ(error_, std::errc::connection_reset) << error_.message();
  EXPECT_NE(diagnostic_.find("reset by peer"), std::string::npos) << diagnostic_;
}

}  // namespace
}  // namespace kvferry::tcp
