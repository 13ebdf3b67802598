// SPDX-License-Identifier: Apache-2.0
// The first question at a url: when it is asked, and what follows.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_metadata.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

/// "a" asks at a url where the test answers: greetings as a kvferry channel does, and questions with a refusal.
class Greetings : public ::testing::Test {
 protected:
  ~Greetings() override { server_.close(); }

  std::error_code connect(const std::string& peer_id = "b",
                          std::chrono::milliseconds timeout = std::chrono::seconds(30)) {
    std::error_code ec;
    (void)a_.lazy_init_peer_connection("a", peer_id, server_.bound_url(), {}, {.timeout = timeout}, ec);
    return ec;
  }
  std::vector<SideMessage> received() {
    const std::lock_guard lock(mutex_);
    return received_;
  }
  [[nodiscard]] static SideMessage answer_to_greeting() {
    return encode_side_message(GreetingAnswer{"ok", protocol_version});
  }
  [[nodiscard]] static ChannelOptions listening() {
    ChannelOptions options;
    options.peer_init_url = kvferry::testing::own_loopback_url();
    return options;
  }

  std::function<void(HandshakeService::Reply)> on_greeting_ = [](HandshakeService::Reply reply) {
    reply(answer_to_greeting());
  };

 private:
  void answer(SideMessage message, HandshakeService::Reply reply) {
    const bool is_greeting = message.is<Greeting>();
    {
      const std::lock_guard lock(mutex_);
      received_.push_back(std::move(message));
    }
    if (is_greeting) {
      on_greeting_(std::move(reply));
    } else {
      reply(encode_side_message(SideMessageError{static_cast<int>(errc::handshake_failed), "the test says so"}));
    }
  }

  std::mutex mutex_;
  std::vector<SideMessage> received_;

 protected:
  HandshakeService server_{
      {.bind_url = kvferry::testing::own_loopback_url()},
      [this](SideMessage message, HandshakeService::Reply reply) { answer(std::move(message), std::move(reply)); }};
  TestChannel a_{listening(), [](const auto&) { return std::make_shared<KeepingLink>(); }};
};

TEST_F(Greetings, AnAttemptThatIsOverAsksNothingMore) {
  std::promise<HandshakeService::Reply> held;
  std::atomic<int> greetings{0};
  on_greeting_ = [&](HandshakeService::Reply reply) {
    if (greetings++ == 0) {
      held.set_value(std::move(reply));
    } else {
      reply(answer_to_greeting());
    }
  };
  auto first = std::async(std::launch::async, [this] { return connect(); });
  HandshakeService::Reply reply = held.get_future().get();
  a_.disconnect("b");
  EXPECT_EQ(first.get(), errc::cancelled);
  reply(answer_to_greeting());
  EXPECT_EQ(connect(), errc::handshake_failed);
  int questions = 0;
  for (const SideMessage& message : received()) {
    questions += message.is<InitQuestion>() ? 1 : 0;
  }
  EXPECT_EQ(questions, 1) << "the second attempt's";
}

TEST_F(Greetings, TheTimeThatOneTookIsNotToldToThePeer) {
  constexpr std::chrono::milliseconds taken{20};
  on_greeting_ = [&](HandshakeService::Reply reply) {
    const auto until = Clock::now() + taken;
    while (Clock::now() < until) {
      std::this_thread::yield();
    }
    reply(answer_to_greeting());
  };
  constexpr std::chrono::milliseconds timeout = std::chrono::minutes(1);
  EXPECT_EQ(connect("b", timeout), errc::handshake_failed);
  const auto question = decode_side_message<InitQuestion>(received().back());
  ASSERT_TRUE(question.timeout_ms);
  EXPECT_LE(*question.timeout_ms, static_cast<std::uint64_t>((timeout + longer_than_the_call - taken).count()));
}

TEST_F(Greetings, MetadataProvesNothing) {
  std::error_code ec;
  (void)a_.connect("a", write_metadata("test", "b", 5, server_.bound_url()), {}, ec);
  EXPECT_EQ(ec, errc::handshake_failed);
  EXPECT_TRUE(received().front().is<Greeting>());
}

TEST_F(Greetings, NorDoesWhereAPeerSaysThatItAnswers) {
  TestChannel asking(ChannelOptions(), [](const auto&) { return std::make_shared<KeepingLink>(); });
  InitQuestion question;
  question.transport = "test";
  question.sender_id = "p";
  question.receiver_id = "a";
  question.incarnation = 7;
  question.init_url = server_.bound_url();
  std::error_code ec;
  asking.send_init_side_msg(a_.peer_init_url(), encode_side_message(question), {}, ec);
  ASSERT_FALSE(ec) << ec.message();
  ASSERT_TRUE(a_.remote_xfer_handler_exists("p"));
  a_.disconnect("p");
  EXPECT_EQ(connect("p"), errc::handshake_failed);
  EXPECT_TRUE(received().front().is<Greeting>());
}

}  // namespace
}  // namespace kvferry::kit::tests
