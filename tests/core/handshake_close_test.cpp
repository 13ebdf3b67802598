// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/handshake_service.hpp>

#include <gtest/gtest.h>
#include <zmq.hpp>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <latch>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "core/handshake_fixture.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace std::chrono_literals;
using namespace test;

class HandshakeClose : public HandshakeFixture {};

TEST_F(HandshakeClose, Line05_CloseEndsWhatIsPending) {
  PeerSocket silent(context_, zmq::socket_type::rep);
  const auto url = silent.bind_anywhere();
  HandshakeService service(listening(), handler());
  auto pending = ask(service, url, echo(1));
  std::ignore = silent.receive_message();
  service.close();
  ASSERT_EQ(pending.wait_for(0s), std::future_status::ready) << "close returned before the question had ended";
  const auto outcome = pending.get();
  EXPECT_EQ(outcome.ec, errc::closed);
  EXPECT_NE(outcome.diagnostic.find(url), std::string::npos) << outcome.diagnostic;
  service.close();
}

TEST_F(HandshakeClose, Line05_ClosedServiceFreesItsPort) {
  HandshakeService first(listening(kvferry::testing::own_loopback_url()), handler());
  first.close();
  const HandshakeService second(listening(first.bound_url()), handler());
  expect_serving(second);
}

TEST_F(HandshakeClose, Line05_AskingAfterCloseStillEndsAndNotInsideTheCall) {
  HandshakeService service(listening(), handler());
  service.close();
  for (std::uint64_t i = 0; i < 10; ++i) {
    const auto outcome = get(ask(service, service.bound_url(), echo(i)));
    EXPECT_EQ(outcome.ec, errc::closed);
    EXPECT_NE(outcome.thread, std::this_thread::get_id());
  }
  service.close();
}

TEST_F(HandshakeClose, Line05_ClosingAndAskingInHandlers) {
  HandshakeService service(listening(), handler());
  std::promise<Outcome> second;
  service.ask(service.bound_url(), echo(1), std::chrono::steady_clock::now() + patience,
              [&](std::error_code, const SideMessage&, const std::string&, const std::string&) {
                service.close();
                service.ask(service.bound_url(), echo(2), std::chrono::steady_clock::now() + patience,
                            [&](std::error_code ec, SideMessage message, std::string diagnostic, const std::string&) {
                              second.set_value({ec, std::move(message), std::move(diagnostic), {}});
                            });
              });
  EXPECT_EQ(get(second).ec, errc::closed);

  // The same on the thread that tells of questions that came after the end.
  std::promise<Outcome> fourth;
  service.ask(service.bound_url(), echo(3), std::chrono::steady_clock::now() + patience,
              [&](std::error_code, const SideMessage&, const std::string&, const std::string&) {
                service.close();
                service.ask(service.bound_url(), echo(4), std::chrono::steady_clock::now() + patience,
                            [&](std::error_code ec, SideMessage message, std::string diagnostic, const std::string&) {
                              fourth.set_value({ec, std::move(message), std::move(diagnostic), {}});
                            });
              });
  EXPECT_EQ(get(fourth).ec, errc::closed);
}

// Whatever is queued: else a flood of requests holds up who closes.
TEST_F(HandshakeClose, Line05_NoFurtherRequestIsTakenOnceItIsClosed) {
  constexpr std::uint64_t many = 200;
  std::promise<void> all_sent;
  auto sent = all_sent.get_future();
  std::promise<void> closed;
  std::atomic<HandshakeService*> own = nullptr;
  std::atomic<std::size_t> taken = 0;
  HandshakeService service(listening(), [&](const SideMessage& request, HandshakeService::Reply reply) {
    const std::size_t number = ++taken;
    if (number == 1) {
      sent.wait_for(patience);
    } else if (number == 2) {
      own.load()->close();
      closed.set_value();
    }
    reply(request);
  });
  own = &service;
  auto peer = connected(zmq::socket_type::dealer, service);
  for (std::uint64_t i = 0; i < many; ++i) {
    peer.send_frames({{}, echo(i).encoded()});
  }
  all_sent.set_value();
  get(closed);
  service.close();
  EXPECT_EQ(taken, 2U);
}

TEST_F(HandshakeClose, Line05_CloseAndAskFromManyThreadsEndEverythingOnce) {
  for (int round = 0; round < 20; ++round) {
    constexpr std::size_t askers = 3;
    constexpr std::size_t questions = 20;
    HandshakeService service(listening(), handler());
    std::latch start(askers + 2);
    std::atomic<std::size_t> ended = 0;
    std::atomic<std::size_t> wrong = 0;
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < askers; ++i) {
      threads.emplace_back([&] {
        start.arrive_and_wait();
        for (std::size_t n = 0; n < questions; ++n) {
          service.ask(service.bound_url(), echo(n), std::chrono::steady_clock::now() + patience,
                      [&](std::error_code ec, const SideMessage&, const std::string&, const std::string&) {
                        wrong += ec && ec != errc::closed ? 1 : 0;
                        ++ended;
                      });
        }
      });
    }
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&] {
        start.arrive_and_wait();
        service.close();
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
    // Also waits for the thread that late questions have started.
    service.close();
    EXPECT_EQ(ended, askers * questions);
    EXPECT_EQ(wrong, 0U);
  }
}

TEST_F(HandshakeClose, Line05_AReplyThatOutlivesItsServiceIsHarmless) {
  std::optional<HandshakeService::Reply> reply;
  std::optional<HandshakeService::Reply> unused;
  auto peer = PeerSocket(context_, zmq::socket_type::dealer);
  {
    await_held(2);
    HandshakeService service(listening(), handler());
    peer.connect(service.bound_url());
    peer.send_frames({{}, encode_side_message(Hold{}).encoded()});
    peer.send_frames({{}, encode_side_message(Hold{}).encoded()});
    auto replies = held_replies();
    reply.emplace(std::move(replies[0]));
    unused.emplace(std::move(replies[1]));
    service.close();
    (*reply)(echo(1));
  }
  (*reply)(echo(2));
  unused.reset();
  zmq::message_t nothing;
  EXPECT_FALSE(peer.recv(nothing, zmq::recv_flags::dontwait));
}

TEST_F(HandshakeClose, Line05_TheUsersContextSurvives) {
  HandshakeService::Options options = listening();
  options.zmq_context = context_.handle();
  {
    HandshakeService service(options, handler());
    EXPECT_EQ(get(ask(service, service.bound_url(), echo(1))).message, echo(1));
    service.close();
    const HandshakeService another(options, handler());
    expect_serving(another);
  }
  PeerSocket server(context_, zmq::socket_type::rep);
  PeerSocket client(context_, zmq::socket_type::req);
  client.connect(server.bind_anywhere());
  client.send_frames({echo(2).encoded()});
  EXPECT_EQ(server.receive_message(), echo(2));
}

TEST_F(HandshakeClose, Line05_AUserWhoTerminatesTheContextIsNotBlocked) {
  const SilentPort nobody;
  zmq::context_t context;
  HandshakeService::Options options = listening();
  options.zmq_context = context.handle();
  HandshakeService service(options, handler());
  EXPECT_EQ(get(ask(service, service.bound_url(), echo(1))).message, echo(1));
  auto unconnected = ask(service, nobody.url(), echo(2));
  PeerSocket silent(context_, zmq::socket_type::rep);
  auto unanswered = ask(service, silent.bind_anywhere(), echo(2));
  std::ignore = silent.receive_message();
  context.close();  // returns once the service has closed its sockets
  EXPECT_EQ(get(std::move(unconnected)).ec, errc::closed);
  EXPECT_EQ(get(std::move(unanswered)).ec, errc::closed);
  EXPECT_EQ(get(ask(service, nobody.url(), echo(3))).ec, errc::closed);
}

TEST_F(HandshakeClose, Line05_UnsentDataDoesNotHoldUpTheEnd) {
  // A peer that reads nothing, so that its replies pile up, as many as the service keeps for one.
  PeerSocket deaf(context_, zmq::socket_type::dealer);
  deaf.set(zmq::sockopt::rcvhwm, 1);
  deaf.set(zmq::sockopt::rcvbuf, 4096);
  constexpr std::size_t requests = 12;
  std::atomic<std::size_t> served = 0;
  std::promise<void> all_served;
  const SideMessage large("Large", Bytes(std::size_t{64} << 10U));
  std::optional<HandshakeService> service(std::in_place, listening(),
                                          [&](const SideMessage&, HandshakeService::Reply reply) {
                                            reply(large);
                                            if (++served == requests) {
                                              all_served.set_value();
                                            }
                                          });
  deaf.connect(service->bound_url());
  for (std::size_t i = 0; i < requests; ++i) {
    deaf.send_frames({{}, echo(i).encoded()});
  }
  get(all_served);
  auto ended = std::async(std::launch::async, [&] { service.reset(); });
  EXPECT_EQ(ended.wait_for(std::chrono::seconds(20)), std::future_status::ready) << "it waits for who reads nothing";
}

}  // namespace
}  // namespace kvferry
