// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/handshake_service.hpp>

#include <gtest/gtest.h>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>
#include <zmq.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "core/handshake_fixture.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace std::chrono_literals;
using namespace test;

class HandshakeServiceFaults : public HandshakeFixture {};

/// A message that looks like a `SideMessageError` at first.
struct HalfError {
  std::string code = "1";

  static constexpr std::string_view side_message_type = SideMessageError::side_message_type;
  static constexpr auto side_message_fields() { return std::tuple(side_message_field("code", &HalfError::code)); }
};

/// The error in a `SideMessageError`.
errc code_in(const SideMessage& message) {
  return static_cast<errc>(decode_side_message<SideMessageError>(message).code);
}

// --- What arrives ----------------------------------------------------------------------------------

TEST_F(HandshakeServiceFaults, Line01_UnknownTypesAreAnsweredWithAnError) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::req, service);
  const auto answer =
      decode_side_message<SideMessageError>(peer.exchange(encode_side_message(P2PInitSideMsg{}).encoded()));
  EXPECT_EQ(answer.code, static_cast<std::int64_t>(errc::unhandled_side_message));
  EXPECT_NE(answer.message.find("no answer to a P2PInitSideMsg"), std::string::npos) << answer.message;
}

TEST_F(HandshakeServiceFaults, Line02_GarbageIsAnsweredWithAnErrorAndHarmsNobody) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::req, service);
  const std::vector<std::vector<Bytes>> garbage{
      {{}},
      {{std::byte{0xC1}}},
      {{std::byte{0x80}}},
      {Bytes(1000, std::byte{0xFF})},
      {Bytes(1000, std::byte{0x91})},
      {echo(1).encoded(), echo(2).encoded()},
      {{}, echo(1).encoded()},
      std::vector<Bytes>(100, echo(1).encoded()),
  };
  for (const auto& frames : garbage) {
    peer.send_frames(frames);
    EXPECT_EQ(code_in(peer.receive_message()), errc::malformed_message);
    EXPECT_EQ(peer.exchange(echo(5).encoded()), echo(5));
  }
}

TEST_F(HandshakeServiceFaults, Line02_RequestsOutsideTheReqProtocolAreAnsweredToo) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::dealer, service);
  const auto expect_error = [&](const std::vector<Bytes>& request, std::size_t reply_frames) {
    peer.send_frames(request);
    const auto reply = peer.receive_frames();
    EXPECT_EQ(reply.size(), reply_frames);
    EXPECT_EQ(code_in(parse_side_message(reply.back())), errc::malformed_message);
  };
  expect_error({echo(1).encoded()}, 1);                          // no delimiter
  expect_error({echo(1).encoded(), echo(1).encoded()}, 1);       // nor here
  expect_error({{}}, 2);                                         // nothing behind the delimiter
  expect_error({Bytes(300), {}, echo(1).encoded()}, 1);          // longer than any identity
  expect_error(std::vector<Bytes>(50, Bytes{std::byte{1}}), 1);  // a delimiter that is far away
  expect_error({{}, echo(1).encoded(), {}}, 2);                  // a frame behind the payload
  peer.send_frames({{}, echo(1).encoded()});
  EXPECT_EQ(peer.receive_message(), echo(1));
}

TEST_F(HandshakeServiceFaults, Line02_ExactlyOneReplyAlsoForErrors) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::dealer, service);
  const auto request = [&](Way way) {
    peer.send_frames({{}, encode_side_message(Misbehave{static_cast<std::uint64_t>(way)}).encoded()});
    return peer.receive_message();
  };
  const auto expect_error = [&](Way way, errc code, const std::string& text) {
    const auto error = decode_side_message<SideMessageError>(request(way));
    EXPECT_EQ(error.code, static_cast<std::int64_t>(code));
    EXPECT_NE(error.message.find(text), std::string::npos) << error.message;
    // A second reply would come before this one.
    peer.send_frames({{}, echo(0).encoded()});
    EXPECT_EQ(peer.receive_message(), echo(0));
  };
  expect_error(Way::drops, errc::handshake_failed, "dropped without an answer");
  expect_error(Way::throws, errc::handshake_failed, "no luck today");
  expect_error(Way::throws_code, errc::version_mismatch, "version 2 is not 1");
  expect_error(Way::throws_int, errc::handshake_failed, "failed");
  for (const auto way : {Way::answers_and_throws, Way::answers_twice}) {
    EXPECT_EQ(request(way), echo(77));
    peer.send_frames({{}, echo(0).encoded()});
    EXPECT_EQ(peer.receive_message(), echo(0));
  }
}

TEST_F(HandshakeServiceFaults, Line02_AReplyThatIsReplacedWasDropped) {
  const HandshakeService service(listening(), handler());
  await_held(2);
  auto first = connected(zmq::socket_type::req, service);
  auto second = connected(zmq::socket_type::req, service);
  for (auto* peer : {&first, &second}) {
    peer->send_frames({encode_side_message(Hold{}).encoded()});
  }
  auto replies = held_replies();
  replies[0] = std::move(replies[1]);
  replies[0](echo(1));
  const auto one = first.receive_message();
  const auto other = second.receive_message();
  EXPECT_NE(one.is<Echo>(), other.is<Echo>());
  EXPECT_EQ(code_in(one.is<Echo>() ? other : one), errc::handshake_failed);
}

TEST_F(HandshakeServiceFaults, Line02_PeersThatDoNotSpeakZeroMqHarmNobody) {
  const HandshakeService service(listening(), handler());
  asio::io_context io;
  asio::ip::tcp::socket stranger(io);
  stranger.connect({asio::ip::address_v4::loopback(), parse_url(service.bound_url()).port});
  const std::string greeting = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + std::string(10'000, '\xFF');
  asio::error_code ignored;  // the service may hang up before all of it is sent
  asio::write(stranger, asio::buffer(greeting), ignored);
  expect_serving(service);
}

TEST_F(HandshakeServiceFaults, Line02_AMessageThatIsTooLargeHarmsNobody) {
  auto options = listening();
  options.max_message_bytes = 1000;
  const HandshakeService service(options, handler());
  auto peer = connected(zmq::socket_type::dealer, service);
  peer.send_frames({{}, Bytes(1001)});
  expect_serving(service);
}

TEST_F(HandshakeServiceFaults, Line02_OwnMessagesThatAreTooLargeAreRefusedWithBothSizes) {
  auto options = listening();
  options.max_message_bytes = 1000;
  const SideMessage large = encode_side_message(SideMessageError{1, std::string(2000, 'x')});
  HandshakeService answers_much(options, [&](const SideMessage&, HandshakeService::Reply reply) { reply(large); });
  HandshakeService client({}, nullptr);
  const auto url = answers_much.bound_url();
  const std::string size = std::to_string(large.encoded().size());
  const auto answer = get(ask(client, url, echo(1)));
  EXPECT_TRUE(answer.ec);
  EXPECT_NE(answer.diagnostic.find(size + " bytes, at most 1000"), std::string::npos) << answer.diagnostic;

  options.bind_url.clear();
  HandshakeService modest(options, nullptr);
  const auto question = get(ask(modest, url, large));
  EXPECT_EQ(question.ec, std::errc::message_size);
  EXPECT_NE(question.diagnostic.find(size + " bytes to " + url + ", at most 1000"), std::string::npos)
      << question.diagnostic;
}

TEST_F(HandshakeServiceFaults, Line02_AMessageThatAServerHangsUpOnEndsAtOnceWithItsSize) {
  auto options = listening();
  options.max_message_bytes = 1000;
  const HandshakeService service(options, handler());
  const SideMessage large = encode_side_message(SideMessageError{1, std::string(10'000, 'x')});
  HandshakeService client({}, nullptr);
  const auto outcome = get(ask(client, service.bound_url(), large));
  EXPECT_EQ(outcome.ec, errc::connection_lost);
  EXPECT_NE(outcome.diagnostic.find(std::to_string(large.encoded().size()) + " bytes: the peer may take none"),
            std::string::npos)
      << outcome.diagnostic;
  expect_serving(service);
}

TEST_F(HandshakeServiceFaults, Line02_AnAnswerThatIsTooLargeEndsTheQuestionWithBothSizes) {
  PeerSocket server(context_, zmq::socket_type::rep);
  const auto url = server.bind_anywhere();
  HandshakeService::Options options;
  options.max_message_bytes = 1000;
  HandshakeService client(options, nullptr);
  auto answer = ask(client, url, echo(1));
  std::ignore = server.receive_message();
  server.send_frames({Bytes(1500)});
  const auto outcome = get(std::move(answer));
  EXPECT_EQ(outcome.ec, std::errc::message_size);
  EXPECT_NE(outcome.diagnostic.find("1500 bytes from " + url + ", at most 1000"), std::string::npos) << outcome.diagnostic;
}

TEST_F(HandshakeServiceFaults, Line02_AnAnswerThatIsGarbageEndsTheQuestion) {
  PeerSocket server(context_, zmq::socket_type::rep);
  const auto url = server.bind_anywhere();
  HandshakeService client({}, nullptr);
  const auto answer_with = [&](const std::vector<Bytes>& frames) {
    auto outcome = ask(client, url, echo(1));
    std::ignore = server.receive_message();
    server.send_frames(frames);
    return get(std::move(outcome));
  };
  for (const auto& frames : std::vector<std::vector<Bytes>>{{{}},
                                                            {{std::byte{0xC1}}},
                                                            {echo(1).encoded(), echo(1).encoded()},
                                                            {encode_side_message(HalfError{}).encoded()}}) {
    const auto outcome = answer_with(frames);
    EXPECT_EQ(outcome.ec, errc::malformed_message);
    EXPECT_EQ(outcome.message, SideMessage());
    EXPECT_NE(outcome.diagnostic.find(url), std::string::npos) << outcome.diagnostic;
  }
  EXPECT_EQ(answer_with({echo(2).encoded()}).message, echo(2));
}

// --- Deadlines -------------------------------------------------------------------------------------

TEST_F(HandshakeServiceFaults, Line03_ASilentServerEndsInATimeout) {
  PeerSocket silent(context_, zmq::socket_type::router);
  const auto url = silent.bind_anywhere();
  HandshakeService client({}, nullptr);
  // On a busy machine there may be no connection in so little time.
  bool asked = false;
  for (auto timeout = 200ms; !asked; timeout *= 4) {
    ASSERT_LT(timeout, patience);
    const auto question = echo(static_cast<std::uint64_t>(timeout.count()));
    const auto begun = std::chrono::steady_clock::now();
    const auto outcome = get(ask(client, url, question, timeout));
    EXPECT_GE(std::chrono::steady_clock::now() - begun, timeout);
    EXPECT_EQ(outcome.ec, errc::timed_out);
    EXPECT_EQ(outcome.ec, condition::retryable);
    for (zmq::message_t frame; silent.recv(frame, zmq::recv_flags::dontwait);) {
      asked = asked || frame == zmq::message_t(question.encoded().data(), question.encoded().size());
    }
    const std::string sentence = "no answer from " + url + " within " + std::to_string(timeout.count()) + " ms";
    EXPECT_TRUE(outcome.diagnostic == sentence || (!asked && outcome.diagnostic.starts_with(sentence)))
        << outcome.diagnostic;
  }
}

TEST_F(HandshakeServiceFaults, Line03_WhereNobodyListensTheTimeoutSaysSo) {
  const SilentPort nobody;
  HandshakeService client({}, nullptr);
  // On a busy machine the time may be over before anything is tried.
  Outcome outcome;
  std::string untried;
  auto timeout = 100ms;
  for (bool tried = false; !tried; timeout *= 4) {
    ASSERT_LT(timeout, patience) << outcome.diagnostic;
    outcome = get(ask(client, nobody.url(), echo(1), timeout));
    EXPECT_EQ(outcome.ec, errc::timed_out);
    untried = "no answer from " + nobody.url() + " within " + std::to_string(timeout.count()) + " ms";
    tried = outcome.diagnostic != untried;
  }
  EXPECT_EQ(outcome.diagnostic, untried + " (no connection was made)");
}

TEST_F(HandshakeServiceFaults, Line03_ADeadlineInThePastSendsNothing) {
  PeerSocket server(context_, zmq::socket_type::rep);
  const auto url = server.bind_anywhere();
  HandshakeService client({}, nullptr);
  const auto outcome = get(ask(client, url, echo(1), 0ms));
  EXPECT_EQ(outcome.ec, errc::timed_out);
  EXPECT_EQ(outcome.diagnostic, "no answer from " + url + " within 0 ms");
  std::promise<std::error_code> ended;
  client.ask(url, echo(2), std::chrono::steady_clock::time_point::min(),
             [&](std::error_code ec, const SideMessage&, const std::string&, const std::string&) { ended.set_value(ec); });
  EXPECT_EQ(get(ended), errc::timed_out);
  auto third = ask(client, url, echo(3));
  EXPECT_EQ(server.receive_message(), echo(3));
}

TEST_F(HandshakeServiceFaults, Line03_AQuestionMayWaitForEver) {
  HandshakeService service(listening(), handler());
  std::promise<SideMessage> answered;
  service.ask(service.bound_url(), echo(1), std::chrono::steady_clock::time_point::max(),
              [&](std::error_code, SideMessage answer, const std::string&, const std::string&) { answered.set_value(std::move(answer)); });
  EXPECT_EQ(get(answered), echo(1));
}

TEST_F(HandshakeServiceFaults, Line03_ALateAnswerIsNotTakenForTheNextOne) {
  PeerSocket server(context_, zmq::socket_type::router);
  const auto url = server.bind_anywhere();
  HandshakeService client({}, nullptr);
  // On a busy machine it may not come in so little time.
  server.set(zmq::sockopt::rcvtimeo, 0);
  std::vector<Bytes> first_request;
  for (auto timeout = 500ms; first_request.empty(); timeout *= 4) {
    ASSERT_LT(timeout, patience);
    EXPECT_EQ(get(ask(client, url, echo(1), timeout)).ec, errc::timed_out);
    if (zmq::message_t name; server.recv(name)) {
      const auto* data = static_cast<const std::byte*>(name.data());
      first_request = server.receive_frames();
      first_request.insert(first_request.begin(), Bytes(data, data + name.size()));
    }
  }
  server.set(zmq::sockopt::rcvtimeo, static_cast<int>(std::chrono::milliseconds(patience).count()));

  auto second = ask(client, url, echo(2));
  auto second_request = server.receive_frames();
  while (second_request.back() != echo(2).encoded()) {
    second_request = server.receive_frames();  // a first one that came late
  }
  EXPECT_NE(first_request.front(), second_request.front()) << "both questions came through one socket";
  server.send_frames(first_request);
  server.send_frames(second_request);
  EXPECT_EQ(get(std::move(second)).message, echo(2));
}

TEST_F(HandshakeServiceFaults, Line03_AServerThatGoesBeforeItAnswersEndsTheQuestion) {
  HandshakeService client({}, nullptr);
  std::optional<PeerSocket> server(std::in_place, context_, zmq::socket_type::rep);
  const auto url = server->bind_at_own_address();
  auto outcome = ask(client, url, echo(1));
  std::ignore = server->receive_message();
  server.reset();
  const auto lost = get(std::move(outcome));
  EXPECT_EQ(lost.ec, errc::connection_lost);
  EXPECT_EQ(lost.ec, condition::peer_failed);
  EXPECT_EQ(lost.diagnostic,
            "connection to " + url + " was lost before an answer came to a message of " +
                std::to_string(echo(1).encoded().size()) +
                " bytes: the peer may take none of this size (ChannelOptions::max_handshake_bytes); an answer of more "
                "than 131072 bytes is not received");
}

TEST_F(HandshakeServiceFaults, Line03_AHandshakeWhoseConnectionWasLostIsAskedAgain) {
  HandshakeService client({}, nullptr);
  std::optional<PeerSocket> server(std::in_place, context_, zmq::socket_type::rep);
  const auto url = server->bind_at_own_address();
  const auto replace_server = [&] {
    server.reset();
    server.emplace(context_, zmq::socket_type::rep);
    server->bind_as_successor(url);
  };
  const SideMessage greeting = encode_side_message(kit::Greeting{"", kit::protocol_version});
  auto outcome = ask(client, url, greeting);
  for (int lost = 0; lost < 3; ++lost) {
    EXPECT_EQ(server->receive_message(), greeting);
    replace_server();
  }
  EXPECT_EQ(server->receive_message(), greeting);
  server->send_frames({echo(1).encoded()});
  EXPECT_EQ(get(std::move(outcome)).message, echo(1));

  outcome = ask(client, url, greeting);
  int times = 0;
  server->set(zmq::sockopt::rcvtimeo, 100);
  while (outcome.wait_for(0s) != std::future_status::ready && times < 100) {
    if (zmq::message_t question; server->recv(question)) {
      ++times;
      replace_server();
      server->set(zmq::sockopt::rcvtimeo, 100);
    }
  }
  EXPECT_EQ(get(std::move(outcome)).ec, errc::connection_lost) << "not without end";
  EXPECT_GT(times, 1);
  EXPECT_LT(times, 20);
}

TEST_F(HandshakeServiceFaults, Line03_TheAnswerOfAServerThatGoesAfterItCounts) {
  HandshakeService client({}, nullptr);
  for (std::uint64_t i = 0; i < 50; ++i) {
    PeerSocket server(context_, zmq::socket_type::rep);
    auto outcome = ask(client, server.bind_anywhere(), echo(i));
    server.set(zmq::sockopt::linger, static_cast<int>(std::chrono::milliseconds(patience).count()));
    server.send_frames({server.receive_message().encoded()});
    server.close();
    EXPECT_EQ(get(std::move(outcome)).message, echo(i));
  }
}

TEST_F(HandshakeServiceFaults, Line03_AServerThatComesUpLateIsReached) {
  const SilentPort port;
  HandshakeService client({}, nullptr);
  auto patient = ask(client, port.url(), echo(1));
  EXPECT_EQ(get(ask(client, port.url(), echo(2), 100ms)).ec, errc::timed_out);
  const HandshakeService server(listening(port.url()), handler());
  EXPECT_EQ(get(std::move(patient)).message, echo(1));
}

// --- Nobody waits for another ----------------------------------------------------------------------

TEST_F(HandshakeServiceFaults, Line04_ASlowReplyDelaysNobodyElse) {
  HandshakeService service(listening(), handler());
  auto slow = connected(zmq::socket_type::req, service);
  slow.send_frames({encode_side_message(Hold{}).encoded()});
  auto reply = held_reply();
  for (std::uint64_t i = 0; i < 20; ++i) {
    expect_serving(service);
    EXPECT_EQ(get(ask(service, service.bound_url(), echo(i))).message, echo(i));
  }
  reply(echo(1));
  EXPECT_EQ(slow.receive_message(), echo(1));
}

TEST_F(HandshakeServiceFaults, Line04_ASilentServerDelaysNoOtherQuestion) {
  PeerSocket silent(context_, zmq::socket_type::rep);
  const SilentPort nobody;
  HandshakeService service(listening(), handler());
  auto unanswered = ask(service, silent.bind_anywhere(), echo(0));
  auto unconnected = ask(service, nobody.url(), echo(0));
  for (std::uint64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(get(ask(service, service.bound_url(), echo(i))).message, echo(i));
  }
  service.close();
  EXPECT_EQ(get(std::move(unanswered)).ec, errc::closed);
  EXPECT_EQ(get(std::move(unconnected)).ec, errc::closed);
}

TEST_F(HandshakeServiceFaults, Line04_AFloodOfRequestsLeavesTimeForQuestions) {
  HandshakeService service(listening(), handler());
  const HandshakeService other(listening(), handler());
  auto flooding = connected(zmq::socket_type::dealer, service);
  std::atomic<bool> done = false;
  std::thread flood([&] {
    while (!done) {
      flooding.send_frames({{}, echo(0).encoded()});
    }
  });
  for (std::uint64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(get(ask(service, other.bound_url(), echo(i))).message, echo(i));
  }
  done = true;
  flood.join();
}

TEST_F(HandshakeServiceFaults, Line04_AHundredQuestionsAtOnceTakeOneThread) {
  constexpr std::size_t count = 100;
  await_held(count);
  const HandshakeService server(listening(), handler());
  HandshakeService client({}, nullptr);
  std::vector<std::future<Outcome>> outcomes;
  for (std::size_t i = 0; i < count; ++i) {
    outcomes.push_back(ask(client, server.bound_url(), encode_side_message(Hold{i})));
  }
  std::uint64_t number = 0;
  for (auto& reply : held_replies()) {
    reply(echo(number++));
  }
  std::vector<std::uint64_t> numbers;
  std::vector<std::thread::id> threads;
  for (auto& outcome : outcomes) {
    auto answered = get(std::move(outcome));
    numbers.push_back(decode_side_message<Echo>(answered.message).number);
    threads.push_back(answered.thread);
  }
  std::ranges::sort(numbers);
  for (std::size_t i = 0; i < count; ++i) {
    EXPECT_EQ(numbers[i], i);
  }
  EXPECT_EQ(std::ranges::count(threads, threads.front()), static_cast<std::ptrdiff_t>(count));
}

}  // namespace
}  // namespace kvferry
