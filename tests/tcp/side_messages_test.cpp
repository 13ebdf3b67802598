// SPDX-License-Identifier: Apache-2.0
// Side messages that are answered late: by a slow handler, and by a channel that wasn't ready.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <atomic>
#include <chrono>
#include <future>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// Answers slowly, and holds what came before it was ready.
class SlowAnswerer : public TcpTransferChannel {
 public:
  explicit SlowAnswerer(TcpOptions options, std::promise<void>& entered, std::future<void> leave)
      : TcpTransferChannel(std::move(options)), entered_(entered), leave_(std::move(leave)) {
    answer_side_messages();
  }
  ~SlowAnswerer() override {
    close();
    EXPECT_TRUE(left_) << "close() returned while handle_init_side_msg was running";
  }
  SideMessage handle_init_side_msg(const SideMessage& message) override {
    entered_.set_value();
    leave_.wait();
    left_ = true;
    return message;
  }

 private:
  std::promise<void>& entered_;
  std::future<void> leave_;
  std::atomic<bool> left_{false};
};

TEST(SideMessages, CloseWaitsForTheAnswerThatIsBeingMade) {
  Node asking(4);
  std::promise<void> entered;
  std::promise<void> leave;
  TcpOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  options.hold_side_messages = true;
  std::optional<SlowAnswerer> slow;
  slow.emplace(std::move(options), entered, leave.get_future());
  auto answer = asking.channel->async_send_init_side_msg(slow->peer_init_url(), encode_side_message(P2PInitSideMsg{}),
                                                         {}, asio::use_future);
  entered.get_future().wait();
  std::thread closer([&] { slow.reset(); });
  // Once the channel is closed, its peers are told so; the answer is still being made.
  EXPECT_THROW(answer.get(), std::system_error);
  leave.set_value();
  closer.join();
}

TEST(SideMessages, HeldMessagesAreAnsweredWhenTheChannelIsReady) {
  Node asking(4);
  TcpOptions options;
  options.hold_side_messages = true;
  options.peer_lookup_url = "tcp://10.0.0.7:5600";
  class Late : public TcpTransferChannel {
   public:
    using TcpTransferChannel::answer_side_messages;
    using TcpTransferChannel::TcpTransferChannel;
  };
  options.peer_init_url = kvferry::testing::own_loopback_url();
  Late late(std::move(options));
  auto answer = asking.channel->async_send_init_side_msg(late.peer_init_url(), encode_side_message(P2PInitSideMsg{}),
                                                         {}, asio::use_future);
  std::error_code held;
  asking.channel->lazy_init_peer_connection("asking", "late", late.peer_init_url(), {}, {.timeout = milliseconds(50)},
                                            held);
  EXPECT_EQ(held, errc::timed_out);
  EXPECT_EQ(answer.wait_for(milliseconds(0)), std::future_status::timeout);
  late.answer_side_messages();
  asking.channel->lazy_init_peer_connection("asking", "late", late.peer_init_url());
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(*answer.get()).peer_lookup_url, "tcp://10.0.0.7:5600");
}

}  // namespace
}  // namespace kvferry::tcp::testing
