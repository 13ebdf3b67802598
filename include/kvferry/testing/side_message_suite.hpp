// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/silent_listener.hpp>
#include <kvferry/testing/suite_macros.hpp>

/// Skips the test, visibly, where the traits cannot make a channel that answers side messages as the test says.
#define KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL() \
  if (!this->facts().answers_side_messages) GTEST_SKIP() << "the traits have no make_answering_channel"

namespace kvferry::inline KVFERRY_ABI::testing {

/// A message of a user's own.
struct Question {
  std::string text;
  std::uint64_t number = 0;

  static constexpr std::string_view side_message_type = "ConformanceQuestion";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("text", &Question::text), side_message_field("number", &Question::number));
  }
};

/// The answer to it.
struct Reply {
  std::string text;

  static constexpr std::string_view side_message_type = "ConformanceReply";
  static constexpr auto side_message_fields() { return std::tuple(side_message_field("text", &Reply::text)); }
};

/// Side messages, with the handshake and without.
class SideMessageTests : public ConformanceBase {
 protected:
  static constexpr const char* lookup_url = "tcp://10.0.0.7:5600";

  [[nodiscard]] static NodeSpec with_lookup_url() {
    NodeSpec spec;
    spec.options.peer_lookup_url = lookup_url;
    return spec;
  }

  [[nodiscard]] static SideMessage answer_question(const SideMessage& message) {
    if (!message.is<Question>()) {
      return {};
    }
    const auto question = decode_side_message<Question>(message);
    if (question.text == "system_error") {
      throw TransferError(errc::resource_limit, "no more questions");
    }
    if (question.text == "odd sentence") {
      constexpr std::size_t more_than_gets_through = std::size_t{1} << 20;
      throw TransferError(errc::resource_limit, question.number == 0   ? "no UTF-8: \xff"
                                                : question.number == 1 ? "a control character: \x01\n"
                                                                       : std::string(more_than_gets_through, 'x'));
    }
    if (question.text == "errno") {
      throw std::system_error(static_cast<int>(question.number), std::generic_category(), "the user's own");
    }
    if (question.text == "runtime_error") {
      throw std::runtime_error("a user's bug");
    }
    return encode_side_message(Reply{question.text + " " + std::to_string(question.number)});
  }

  void expect_lookup_answer(const std::optional<SideMessage>& answer) {
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(*answer, encode_side_message(P2PInitSideRetMsg{lookup_url}));
  }

 public:
  void LookupUrlWithTheHandshake() {
    const auto [a, b] = pair({}, with_lookup_url());
    const SideMessage message = encode_side_message(P2PInitSideMsg{});
    const auto first = start_connect(a, a.id(), b.id(), b.url(), message);
    EXPECT_FALSE(first->error()) << first->error().message();
    expect_lookup_answer(std::get<1>(first->results()));
    // Connected already: the message is sent all the same.
    const auto second = start_connect(a, a.id(), b.id(), b.url(), message);
    expect_lookup_answer(std::get<1>(second->results()));
    expect_lookup_answer(a->lazy_init_peer_connection(a.id(), b.id(), b.url(), message));
    expect_usable(a, b);
  }

  void NoAnswerWithoutQuestion() {
    const auto [a, b] = pair({}, with_lookup_url());
    const auto handshake = start_connect(a, b);
    EXPECT_FALSE(handshake->error());
    EXPECT_FALSE(std::get<1>(handshake->results()).has_value());
  }

  void LookupUrlThatIsNotConfigured() {
    const auto [a, b] = pair();
    const auto handshake = start_connect(a, a.id(), b.id(), b.url(), encode_side_message(P2PInitSideMsg{}));
    EXPECT_FALSE(handshake->error()) << "as LMCache does";
    EXPECT_EQ(std::get<1>(handshake->results()), encode_side_message(P2PInitSideRetMsg{""}));
  }

  void UnknownTypeIsRefused() {
    const auto [a, b] = pair();
    const SideMessage question = encode_side_message(Question{"anyone?", 1});
    std::string diagnostic;
    EXPECT_EQ(start_side_message(a, b.url(), question, {{}, &diagnostic})->error(), errc::unhandled_side_message);
    EXPECT_NE(diagnostic.find(Question::side_message_type), std::string::npos) << diagnostic;
    EXPECT_EQ(start_connect(a, a.id(), b.id(), b.url(), question)->error(), errc::unhandled_side_message);

    std::error_code error;
    EXPECT_EQ(a->send_init_side_msg(b.url(), question, {}, error), SideMessage());
    EXPECT_EQ(error, errc::unhandled_side_message);
    EXPECT_THROW(a->send_init_side_msg(b.url(), question), TransferError);
    connect(a, b);
    expect_usable(a, b);
  }

  void NeedsNoConnectionAndMakesNone() {
    const auto [a, b] = pair({.listens = false}, with_lookup_url());
    const auto exchange = start_side_message(a, b.url(), encode_side_message(P2PInitSideMsg{}));
    EXPECT_FALSE(exchange->error()) << exchange->error().message();
    expect_lookup_answer(std::get<1>(exchange->results()));
    expect_lookup_answer(a->send_init_side_msg(b.url(), encode_side_message(P2PInitSideMsg{})));
    EXPECT_FALSE(a->remote_xfer_handler_exists(b.id()));
    EXPECT_FALSE(b->remote_xfer_handler_exists(a.id()));
  }

  void ServesPySocketPeers() {
    const auto [a, b] = pair();
    const SideMessage answer =
        a->send_init_side_msg(b.url(), encode_side_message(PySocketInitRequest{"10.0.0.7:5555"}));
    EXPECT_EQ(answer, encode_side_message(PySocketInitResponse{"ok"}));
  }

  void ErrorsOfTheCall() {
    const SilentListener nobody;
    Node& node = add_node();
    const SideMessage message = encode_side_message(P2PInitSideMsg{});
    EXPECT_EQ(start_side_message(node, "nonsense", message)->error(), errc::invalid_url);
    const auto unanswered = start_side_message(node, nobody.url(), message, {std::chrono::milliseconds(200), nullptr});
    EXPECT_TRUE(is(unanswered->error(), condition::timed_out));
    const auto hasty = start_side_message(node, nobody.url(), message, {std::chrono::milliseconds(0), nullptr});
    EXPECT_TRUE(is(hasty->error(), condition::timed_out));
  }

  void UsersOwnAnswers() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    NodeSpec spec = with_lookup_url();
    spec.answer = answer_question;
    const auto [a, b] = pair({}, spec);
    const auto reply = start_connect(a, a.id(), b.id(), b.url(), encode_side_message(Question{"how many?", 42}));
    ASSERT_FALSE(reply->error()) << reply->error().message();
    EXPECT_EQ(std::get<1>(reply->results()), encode_side_message(Reply{"how many? 42"}));
    // The channel answers messages that the user doesn't.
    expect_lookup_answer(a->send_init_side_msg(b.url(), encode_side_message(P2PInitSideMsg{})));
    expect_usable(a, b);
  }

  void ExceptionsOfTheUsersAnswerBecomeErrors() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    const auto [a, b] = pair({}, {.answer = answer_question});
    std::string diagnostic;
    const auto refused =
        start_side_message(a, b.url(), encode_side_message(Question{"system_error", 0}), {{}, &diagnostic});
    EXPECT_EQ(refused->error(), errc::resource_limit);
    EXPECT_NE(diagnostic.find("no more questions"), std::string::npos) << diagnostic;
    EXPECT_TRUE(start_side_message(a, b.url(), encode_side_message(Question{"runtime_error", 0}))->error());
    // The code arrives with any sentence.
    for (std::uint64_t sentence = 0; sentence < 3; ++sentence) {
      const auto asked = start_side_message(a, b.url(), encode_side_message(Question{"odd sentence", sentence}));
      EXPECT_EQ(asked->error(), errc::resource_limit) << "sentence " << sentence;
    }
    // The system's codes go along as the one of kvferry's that callers decide by.
    const auto ended = [&, &asking = a, url = b.url()](std::uint64_t number) {
      return start_side_message(asking, url, encode_side_message(Question{"errno", number}))->error();
    };
    EXPECT_EQ(ended(ECONNRESET), errc::connection_lost);
    EXPECT_EQ(ended(EMFILE), errc::resource_limit);
    EXPECT_EQ(ended(EINVAL), errc::handshake_failed);
    const SideMessage answer = a->send_init_side_msg(b.url(), encode_side_message(Question{"still there?", 1}));
    EXPECT_EQ(answer, encode_side_message(Reply{"still there? 1"}));
  }

  void SlowAnswerDelaysNoHandshakeAndNoTransfer() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    std::binary_semaphore answering(0);
    std::binary_semaphore may_answer(0);
    const auto patience = limit();
    const auto slow = [&](const SideMessage&) {
      answering.release();
      EXPECT_TRUE(may_answer.try_acquire_for(patience));
      return encode_side_message(Reply{"at last"});
    };
    Node& hub = add_node({.answer = slow});
    Node& asking = add_node();
    Node& other = add_node();
    const auto question =
        start_connect(asking, asking.id(), hub.id(), hub.url(), encode_side_message(Question{"?", 0}));
    ASSERT_TRUE(answering.try_acquire_for(patience));

    connect(other, hub);
    expect_usable(other, hub);
    expect_usable(asking, hub);
    EXPECT_FALSE(question->ended());

    may_answer.release();
    EXPECT_FALSE(question->error()) << question->error().message();
    EXPECT_EQ(std::get<1>(question->results()), encode_side_message(Reply{"at last"}));
  }

  void AskerMayCloseWhileWaiting() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    std::binary_semaphore answering(0);
    std::binary_semaphore may_answer(0);
    const auto patience = limit();
    Node& slow = add_node({.answer = [&](const SideMessage&) {
      answering.release();
      EXPECT_TRUE(may_answer.try_acquire_for(patience));
      return encode_side_message(Reply{"too late"});
    }});
    Node& asking = add_node();
    const auto question = start_side_message(asking, slow.url(), encode_side_message(Question{"?", 0}));
    EXPECT_TRUE(answering.try_acquire_for(patience));
    asking->close();
    EXPECT_EQ(question->error(), errc::closed);
    may_answer.release();
    slow->close();
  }

  void ClosingWaitsForNoMoreThanTheAnswerThatIsUnderWay() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    std::binary_semaphore answering(0);
    std::atomic<int> answered{0};
    const NodeSpec spec{.answer = [&](const SideMessage&) {
      if (answered++ == 0) {
        answering.release();
      }
      std::this_thread::sleep_for(std::chrono::seconds(1));  // a user's, who takes his time
      return encode_side_message(Reply{"at last"});
    }};
    Node& slow = add_node(spec);
    Node& asking = add_node();
    std::vector<std::shared_ptr<SideMessageProbe>> exchanges;
    for (std::uint64_t i = 0; i < 100; ++i) {
      exchanges.push_back(start_side_message(asking, slow.url(), encode_side_message(Question{"?", i})));
    }
    ASSERT_TRUE(answering.try_acquire_for(limit()));
    std::atomic<int> before = answered.load();
    std::promise<void> closes;
    // A channel may have other things to close first, and thereby wait for threads. A wait for a notification ends late.
    slow->async_receive_notification({}, [&](std::error_code, const Notification&) {
      before = answered.load();
      closes.set_value();
    });
    auto closing = closes.get_future();
    if (!capabilities().notifications) {
      in_time(closing);
    }
    slow->close();
    const int at_the_end = answered;
    if (capabilities().notifications) {
      in_time(closing);
    }
    EXPECT_LE(at_the_end, before + 1) << "a hundred answers take a hundred seconds";
    EXPECT_LT(at_the_end, 50) << "it has waited for the rest";
    asking->close();
    for (const auto& exchange : exchanges) {
      (void)exchange->error();  // has ended
    }
  }

  void ManyAtOnce() {
    KVFERRY_TESTING_REQUIRE_ANSWERING_CHANNEL();
    const auto [a, b] = pair({.answer = answer_question}, {.answer = answer_question});
    std::vector<std::shared_ptr<SideMessageProbe>> exchanges;
    for (std::uint64_t i = 0; i < 100; ++i) {
      const SideMessage question = encode_side_message(Question{"number", i});
      exchanges.push_back(start_side_message(a, b.url(), question));
      exchanges.push_back(start_side_message(b, a.url(), question));
    }
    for (std::size_t i = 0; i < exchanges.size(); ++i) {
      ASSERT_FALSE(exchanges[i]->error()) << exchanges[i]->error().message();
      EXPECT_EQ(std::get<1>(exchanges[i]->results()), encode_side_message(Reply{"number " + std::to_string(i / 2)}));
    }
  }
};

KVFERRY_TESTING_SUITE(SideMessageTest, SideMessageTests, LookupUrlWithTheHandshake, NoAnswerWithoutQuestion,
                      LookupUrlThatIsNotConfigured, UnknownTypeIsRefused, NeedsNoConnectionAndMakesNone,
                      ServesPySocketPeers, ErrorsOfTheCall, UsersOwnAnswers, ExceptionsOfTheUsersAnswerBecomeErrors,
                      SlowAnswerDelaysNoHandshakeAndNoTransfer, AskerMayCloseWhileWaiting,
                      ClosingWaitsForNoMoreThanTheAnswerThatIsUnderWay, ManyAtOnce);

}  // namespace kvferry::testing
