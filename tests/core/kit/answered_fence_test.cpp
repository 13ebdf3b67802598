// SPDX-License-Identifier: Apache-2.0
// A peer that has answered a fence has nothing left from before it, and isn't told of it when it connects again.
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

/// A link whose peer answers a fence at once, or whose connection has just ended.
class FencedLink final : public KeepingLink {
 public:
  explicit FencedLink(bool answers) : ended_(std::make_shared<std::atomic<bool>>(!answers)) {}
  [[nodiscard]] bool fence(std::function<void()> done) override {
    done();
    return true;
  }
  [[nodiscard]] std::shared_ptr<const std::atomic<bool>> ended() const noexcept override { return ended_; }

 private:
  const std::shared_ptr<const std::atomic<bool>> ended_;
};

class AnsweredFence : public ::testing::Test {
 protected:
  AnsweredFence() {
    ChannelOptions options;
    options.peer_init_url = kvferry::testing::own_loopback_url();
    here_.emplace(options, [this](const auto&) { return std::make_shared<FencedLink>(answers_); });
  }

  /// "p" asks, and is connected. @return how long ago it hears that the last fence was.
  std::optional<std::uint64_t> connect(const std::string& as = "here", std::uint64_t incarnation = 2) {
    InitQuestion question;
    question.transport = "test";
    question.sender_id = "p";
    question.receiver_id = as;
    question.incarnation = incarnation;
    question.secret = Bytes(16, static_cast<std::byte>(incarnation));
    const auto answer = asking_.send_init_side_msg(here_->peer_init_url(), encode_side_message(question));
    EXPECT_TRUE(here_->remote_xfer_handler_exists("p"));
    return decode_side_message<InitAnswer>(answer).fenced_us;
  }
  void fence() { here_->fence("p"); }

  bool answers_ = true;
  TestChannel asking_{ChannelOptions(), [](const auto&) { return std::make_shared<KeepingLink>(); }};
  std::optional<TestChannel> here_;
};

TEST_F(AnsweredFence, IsNotToldToWhoHasAnsweredIt) {
  EXPECT_FALSE(connect());
  fence();
  EXPECT_FALSE(connect());
  here_->disconnect("p");
  EXPECT_FALSE(connect()) << "what it has started since then is not to be refused";
}

TEST_F(AnsweredFence, IsToldWhereTheConnectionEndedInsteadOfAnAnswer) {
  answers_ = false;
  EXPECT_FALSE(connect());
  fence();
  EXPECT_TRUE(connect());
}

TEST_F(AnsweredFence, IsToldIfALaterOneWasNotAnswered) {
  EXPECT_FALSE(connect());
  fence();
  here_->disconnect("p");
  fence();  // there is nobody to be asked
  EXPECT_TRUE(connect());
}

TEST_F(AnsweredFence, IsToldToAnotherIncarnationAndWhereThisSideIsKnownByAnotherName) {
  EXPECT_FALSE(connect());
  fence();
  EXPECT_TRUE(connect("here too")) << "its writes to this name had not been waited for";
  here_->disconnect("p");
  EXPECT_TRUE(connect("here", 3));
  fence();
  EXPECT_FALSE(connect("here", 3));
}

}  // namespace
}  // namespace kvferry::kit::tests
