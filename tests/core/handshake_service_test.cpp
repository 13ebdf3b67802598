// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/handshake_service.hpp>

#include <gtest/gtest.h>
#include <pthread.h>
#include <asio/error.hpp>
#include <zmq.hpp>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <future>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "core/handshake_fixture.hpp"
#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace test;

class HandshakeServiceTest : public HandshakeFixture {};

// --- Serving -------------------------------------------------------------------------------------------------------

TEST_F(HandshakeServiceTest, PortZeroIsReplacedByTheRealOne) {
  const HandshakeService service(listening(), handler());
  const auto url = parse_url(service.bound_url());
  EXPECT_EQ(url.host, "127.0.0.1");
  EXPECT_NE(url.port, 0);
  EXPECT_TRUE(service.bound_url().starts_with("tcp://"));
  expect_serving(service);
}

TEST_F(HandshakeServiceTest, WithoutAUrlItOnlyAsks) {
  HandshakeService client({}, nullptr);
  EXPECT_EQ(client.bound_url(), "");
  const HandshakeService server(listening(), handler());
  EXPECT_EQ(get(ask(client, server.bound_url(), echo(1))).message, echo(1));
}

TEST_F(HandshakeServiceTest, AUrlNeedsNoScheme) {
  HandshakeService server(listening("127.0.0.1:0"), handler());
  const auto without_scheme = parse_url(server.bound_url()).to_string();
  EXPECT_EQ(get(ask(server, without_scheme, echo(1))).message, echo(1));
}

TEST_F(HandshakeServiceTest, AnAddressInUseIsAClearError) {
  const HandshakeService service(listening(), handler());
  try {
    const HandshakeService second(listening(service.bound_url()), handler());
    ADD_FAILURE() << "listens";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::address_in_use);
    const std::string text = error.what();
    EXPECT_NE(text.find(service.bound_url()), std::string::npos) << text;
    EXPECT_NE(text.find("Address already in use"), std::string::npos) << text;
  }
  expect_serving(service);
}

TEST_F(HandshakeServiceTest, UrlsAtWhichItCannotListenAreRefused) {
  const auto error_of = [this](const std::string& url) -> std::error_code {
    try {
      const HandshakeService service(listening(url), handler());
    } catch (const TransferError& error) {
      EXPECT_NE(std::string(error.what()).find(url), std::string::npos) << error.what();
      return error.code();
    }
    return {};
  };
  EXPECT_EQ(error_of("nonsense"), errc::invalid_url);
  EXPECT_EQ(error_of("ipc://socket:1"), errc::invalid_url);
  EXPECT_EQ(error_of(std::string(64, 'a') + ":0"), std::errc::address_not_available);
}

TEST(HandshakeFaults, Line09_Ipv6) {
  std::optional<HandshakeService> server;
  try {
    server.emplace(HandshakeService::Options{.bind_url = "tcp://[::1]:0"},
                   [](const SideMessage& request, HandshakeService::Reply reply) { reply(request); });
  } catch (const TransferError& error) {
    GTEST_SKIP() << "This machine has no IPv6 loopback: " << error.what();
  }
  EXPECT_TRUE(server->bound_url().starts_with("tcp://[::1]:")) << server->bound_url();
  EXPECT_EQ(get(ask(*server, server->bound_url(), echo(6))).message, echo(6));
}

TEST_F(HandshakeServiceTest, AWildcardListensWhereIpv4PeersFindIt) {
  HandshakeService service(listening("*:0"), handler());
  const auto url = parse_url(service.bound_url());
  EXPECT_EQ(url.host, "*");
  EXPECT_EQ(get(ask(service, "127.0.0.1:" + std::to_string(url.port), echo(1))).message, echo(1));
}

TEST_F(HandshakeServiceTest, NamesAreResolvedWhenListeningAndWhenAsking) {
  HandshakeService service(listening("localhost:0"), handler());
  EXPECT_TRUE(service.bound_url().starts_with("tcp://localhost:")) << service.bound_url();
  EXPECT_EQ(get(ask(service, service.bound_url(), echo(1))).message, echo(1));
}

TEST_F(HandshakeServiceTest, ANameIsTriedAtAllItsAddresses) {
  // A listener without IPv6 listens at localhost's IPv4 address only.
  PeerSocket server(context_, zmq::socket_type::rep);
  const auto port = parse_url(server.bind_anywhere()).port;
  HandshakeService client({}, nullptr);
  auto outcome = ask(client, "tcp://localhost:" + std::to_string(port), echo(1));
  server.send_frames({server.receive_message().encoded()});
  EXPECT_EQ(get(std::move(outcome)).message, echo(1));
}

TEST_F(HandshakeServiceTest, APeerThatReusesItsIdentityGetsThrough) {
  const HandshakeService service(listening(), handler());
  PeerSocket first(context_, zmq::socket_type::req);
  first.set(zmq::sockopt::routing_id, "worker-0");
  first.connect(service.bound_url());
  EXPECT_EQ(first.exchange(echo(1).encoded()), echo(1));
  PeerSocket second(context_, zmq::socket_type::req);
  second.set(zmq::sockopt::routing_id, "worker-0");
  second.connect(service.bound_url());
  EXPECT_EQ(second.exchange(echo(2).encoded()), echo(2));
}

TEST_F(HandshakeServiceTest, AReplyFindsItsWayBackThroughAProxy) {
  const HandshakeService service(listening(), handler());
  auto proxy = connected(zmq::socket_type::dealer, service);
  const Bytes inner_identity{std::byte{0}, std::byte{7}};
  proxy.send_frames({inner_identity, {}, echo(3).encoded()});
  EXPECT_EQ(proxy.receive_frames(), (std::vector<Bytes>{inner_identity, {}, echo(3).encoded()}));
}

TEST_F(HandshakeServiceTest, WhoThrowsWhenAnsweredHarmsNobody) {
  HandshakeService service(listening(), handler());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  std::promise<void> told;
  service.ask(service.bound_url(), echo(1), deadline,
              [](std::error_code, const SideMessage&, const std::string&, const std::string&) {
                throw std::runtime_error("who asked has trouble");
              });
  service.ask("tcp://127.0.0.1:0", echo(1), deadline,
              [](std::error_code, const SideMessage&, const std::string&, const std::string&) { throw 1; });
  service.ask(service.bound_url(), echo(2), deadline,
              [&](std::error_code ec, const SideMessage& answer, const std::string&, const std::string&) {
                EXPECT_FALSE(ec);
                EXPECT_EQ(answer, echo(2));
                told.set_value();
              });
  get(told);
  expect_serving(service);
  auto silent = service.bound_url();
  service.ask(silent, encode_side_message(Hold{}), deadline,
              [](std::error_code, const SideMessage&, const std::string&, const std::string&) { throw 1; });
  service.close();
}

TEST_F(HandshakeServiceTest, AReplyMayComeFromAnyThread) {
  const HandshakeService service(listening(), handler());
  auto peer = connected(zmq::socket_type::req, service);
  peer.send_frames({encode_side_message(Hold{}).encoded()});
  std::thread([reply = held_reply()]() mutable { reply(echo(9)); }).join();
  EXPECT_EQ(peer.receive_message(), echo(9));
}

TEST_F(HandshakeServiceTest, ASignalDoesNotDisturbIt) {
  struct sigaction action {};
  struct sigaction previous {};
  action.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGUSR1, &action, &previous), 0);
  std::promise<pthread_t> thread;
  HandshakeService service(listening(), [&](const SideMessage& request, HandshakeService::Reply reply) {
    if (request.is<Hold>()) {
      thread.set_value(::pthread_self());
    }
    reply(request);
  });
  EXPECT_TRUE(get(ask(service, service.bound_url(), encode_side_message(Hold{}))).message.is<Hold>());
  const auto service_thread = get(thread);
  for (std::uint64_t i = 0; i < 100; ++i) {
    ASSERT_EQ(::pthread_kill(service_thread, SIGUSR1), 0);
    EXPECT_EQ(get(ask(service, service.bound_url(), echo(i))).message, echo(i));
  }
  ::sigaction(SIGUSR1, &previous, nullptr);
}

// --- Asking --------------------------------------------------------------------------------------------------------

TEST_F(HandshakeServiceTest, UrlsThatCannotBeAskedEndTheQuestion) {
  HandshakeService client({}, nullptr);
  for (const auto* url : {"", "nonsense", "http://127.0.0.1:1", "*:80", "0.0.0.0:80", "[::]:80", "127.0.0.1:0", "0:80", "[::0]:80",
                          "[::ffff:0.0.0.0]:80", "[fe80::1]:80", "[fe80::1%nosuch0]:80", "[fe80::1%4000000000]:80",
                          "224.0.0.1:80", "[ff02::1]:80", "255.255.255.255:80"}) {
    const auto outcome = get(ask(client, url, echo(1)));
    EXPECT_EQ(outcome.ec, errc::invalid_url) << url;
    EXPECT_NE(outcome.diagnostic.find(url), std::string::npos) << outcome.diagnostic;
    EXPECT_NE(outcome.thread, std::this_thread::get_id());
  }
}

TEST_F(HandshakeServiceTest, AHostThatDoesNotResolveEndsTheQuestion) {
  // No name has a label of 64 characters, so no server is asked for it.
  const auto url = "tcp://" + std::string(64, 'a') + ":5555";
  HandshakeService client({}, nullptr);
  const auto outcome = get(ask(client, url, echo(1)));
  EXPECT_EQ(&outcome.ec.category(), &asio::error::get_netdb_category()) << outcome.ec.message();
  EXPECT_EQ(outcome.ec, condition::peer_failed);
  EXPECT_TRUE(outcome.diagnostic.starts_with("cannot resolve the host of " + url)) << outcome.diagnostic;
}

struct ErrorAnswer {
  std::int64_t code;
  errc expected;
};

class HandshakeErrorAnswer : public HandshakeServiceTest, public ::testing::WithParamInterface<ErrorAnswer> {};

TEST_P(HandshakeErrorAnswer, BecomesAnErrorCode) {
  HandshakeService server(listening(), [](const SideMessage&, HandshakeService::Reply reply) {
    reply(encode_side_message(SideMessageError{GetParam().code, "field \"version\": 1 is not 2"}));
  });
  const auto outcome = get(ask(server, server.bound_url(), echo(1)));
  EXPECT_EQ(outcome.ec, GetParam().expected);
  EXPECT_EQ(outcome.message, SideMessage());
  EXPECT_EQ(outcome.diagnostic, server.bound_url() + " answered: field \"version\": 1 is not 2");
}

TEST_F(HandshakeServiceTest, OfWhatAPeerSaysOfAnErrorAHundredBytesAreQuotedAndEscaped) {
  HandshakeService server(listening(), [](const SideMessage&, HandshakeService::Reply reply) {
    reply(encode_side_message(SideMessageError{1, "a\n\x1b[31m" + std::string(10'000, 'x')}));
  });
  const auto outcome = get(ask(server, server.bound_url(), echo(1)));
  EXPECT_EQ(outcome.diagnostic, server.bound_url() + " answered: a\\x0a\\x1b[31m" + std::string(100 - 7, 'x') + "...");
}

void PrintTo(const ErrorAnswer& answer, std::ostream* stream) { *stream << "code " << answer.code; }

constexpr std::int64_t number_of(errc code) { return static_cast<std::int64_t>(code); }

INSTANTIATE_TEST_SUITE_P(
    HandshakeFaults_Line09, HandshakeErrorAnswer,
    ::testing::Values(ErrorAnswer{number_of(errc::empty_peer_id), errc::empty_peer_id},
                    ErrorAnswer{number_of(errc::version_mismatch), errc::version_mismatch},
                    ErrorAnswer{number_of(errc::invalid_peer_id), errc::invalid_peer_id},
                    ErrorAnswer{number_of(errc::forked), errc::handshake_failed},
                    ErrorAnswer{1000, errc::handshake_failed},
                    ErrorAnswer{number_of(errc::closed), errc::peer_closed},
                    ErrorAnswer{number_of(errc::cancelled), errc::peer_cancelled},
                    ErrorAnswer{0, errc::handshake_failed}, ErrorAnswer{-1, errc::handshake_failed},
                    ErrorAnswer{std::int64_t{1} << 40, errc::handshake_failed}));

}  // namespace
}  // namespace kvferry
