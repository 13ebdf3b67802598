// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <zmq.hpp>

#include <cstddef>
#include <cstdint>
#include <future>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message_codec.hpp>

#include "core/handshake_test_support.hpp"

namespace kvferry::inline KVFERRY_ABI::test {

/// A message with a number, to tell one from another.
template <const char* Name>
struct Numbered {
  std::uint64_t number = 0;

  static constexpr std::string_view side_message_type = Name;
  static constexpr auto side_message_fields() { return std::tuple(side_message_field("number", &Numbered::number)); }
};

inline constexpr char echo_name[] = "Echo";
inline constexpr char hold_name[] = "Hold";
inline constexpr char misbehave_name[] = "Misbehave";
using Echo = Numbered<echo_name>;
using Hold = Numbered<hold_name>;
using Misbehave = Numbered<misbehave_name>;

inline SideMessage echo(std::uint64_t number) { return encode_side_message(Echo{number}); }

/// Ways for a handler of requests to go wrong, and two to go right.
enum class Way : std::uint64_t { drops, throws, throws_code, throws_int, answers_and_throws, answers_twice };

inline void misbehave(Way way, HandshakeService::Reply reply) {
  switch (way) {
    case Way::drops: return;
    case Way::throws: throw std::runtime_error("no luck today");
    case Way::throws_code: throw TransferError(errc::version_mismatch, "version 2 is not 1");
    case Way::throws_int: throw 1;
    case Way::answers_and_throws: reply(echo(77)); throw std::runtime_error("too late");
    case Way::answers_twice:
      reply(echo(77));
      reply(echo(78));
      return;
  }
}

class HandshakeFixture : public ::testing::Test {
 protected:
  static HandshakeService::Options listening(const std::string& url = "tcp://127.0.0.1:0") { return {.bind_url = url}; }

  /// Answers Echo at once, keeps the reply to Hold, misbehaves as Misbehave tells, and refuses everything else.
  HandshakeService::RequestHandler handler() {
    return [this](const SideMessage& request, HandshakeService::Reply reply) {
      if (request.is<Echo>()) {
        reply(request);
      } else if (request.is<Hold>()) {
        hold(std::move(reply));
      } else if (request.is<Misbehave>()) {
        misbehave(static_cast<Way>(decode_side_message<Misbehave>(request).number), std::move(reply));
      } else {
        throw TransferError(errc::unhandled_side_message, "no answer to a " + request.type());
      }
    };
  }

  /// How many replies `held_replies` waits for; one if nothing is said.
  void await_held(std::size_t count) {
    const std::lock_guard lock(mutex_);
    awaited_ = count;
  }

  void hold(HandshakeService::Reply reply) {
    const std::lock_guard lock(mutex_);
    held_.push_back(std::move(reply));
    if (held_.size() == awaited_) {
      all_held_.set_value();
    }
  }

  /// Waits until as many replies as were awaited are held, and hands them out.
  std::vector<HandshakeService::Reply> held_replies() {
    get(all_held_);
    const std::lock_guard lock(mutex_);
    return std::move(held_);
  }

  /// Hands out the only reply that is awaited.
  HandshakeService::Reply held_reply() { return std::move(held_replies().front()); }

  PeerSocket connected(zmq::socket_type type, const HandshakeService& service) {
    PeerSocket socket(context_, type);
    socket.connect(service.bound_url());
    return socket;
  }

  void expect_serving(const HandshakeService& service) {
    auto peer = connected(zmq::socket_type::req, service);
    EXPECT_EQ(peer.exchange(echo(4711).encoded()), echo(4711));
  }

  zmq::context_t context_;
  std::mutex mutex_;
  std::size_t awaited_ = 1;
  std::vector<HandshakeService::Reply> held_;
  std::promise<void> all_held_;
};

/// A port of which it is certain that nobody listens there, for as long as this lives.
class SilentPort {
 public:
  SilentPort() : socket_(io_) {
    socket_.open(asio::ip::tcp::v4());
    socket_.set_option(asio::ip::tcp::acceptor::reuse_address(true));
    socket_.bind({asio::ip::address_v4::loopback(), 0});
  }

  [[nodiscard]] std::string url() const { return "tcp://127.0.0.1:" + std::to_string(socket_.local_endpoint().port()); }

 private:
  asio::io_context io_;
  asio::ip::tcp::socket socket_;
};

}  // namespace kvferry::test
