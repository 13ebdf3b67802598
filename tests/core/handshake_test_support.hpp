// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <zmq.hpp>

#include <cerrno>
#include <chrono>
#include <future>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

using kit::HandshakeService;

/// Longer than anything takes that works.
inline constexpr std::chrono::seconds patience{60};

/// Waits for what must come. @throws if it does not.
template <class T>
T get(std::future<T> future) {
  if (future.wait_for(patience) != std::future_status::ready) {
    throw std::runtime_error("nothing came");
  }
  return future.get();
}

template <class T>
T get(std::promise<T>& promise) {
  return get(promise.get_future());
}

/// The outcome of a question.
struct Outcome {
  std::error_code ec;
  SideMessage message;
  std::string diagnostic;
  std::thread::id thread;
  std::string reached_address = {};
};

/// Asks and returns the outcome to come. A second call of the handler makes it throw `std::future_error`.
inline std::future<Outcome> ask(HandshakeService& service, const std::string& url, const SideMessage& question,
                                std::chrono::steady_clock::duration timeout = patience) {
  auto promise = std::make_shared<std::promise<Outcome>>();
  auto outcome = promise->get_future();
  service.ask(url, question, std::chrono::steady_clock::now() + timeout,
              [promise](std::error_code ec, SideMessage answer, std::string diagnostic, std::string reached) {
                promise->set_value(
                    {ec, std::move(answer), std::move(diagnostic), std::this_thread::get_id(), std::move(reached)});
              });
  return outcome;
}

/// A ZeroMQ socket of a test: gives up after a while instead of blocking for ever.
class PeerSocket : public zmq::socket_t {
 public:
  PeerSocket(zmq::context_t& context, zmq::socket_type type) : zmq::socket_t(context, type) {
    set(zmq::sockopt::linger, 0);
    set(zmq::sockopt::rcvtimeo, static_cast<int>(std::chrono::milliseconds(patience).count()));
    set(zmq::sockopt::sndtimeo, static_cast<int>(std::chrono::milliseconds(patience).count()));
  }

  std::string bind_anywhere() {
    bind("tcp://127.0.0.1:0");
    return get(zmq::sockopt::last_endpoint);
  }
  /// Where no other process listens when this one has let go of the port.
  std::string bind_at_own_address() {
    bind(kvferry::testing::own_loopback_url());
    return get(zmq::sockopt::last_endpoint);
  }

  /// Also at a port whose last owner is just letting go of it.
  void bind_as_successor(const std::string& url) {
    const auto until = std::chrono::steady_clock::now() + patience;
    for (;;) {
      try {
        bind(url);
        return;
      } catch (const zmq::error_t& error) {
        if (error.num() != EADDRINUSE || std::chrono::steady_clock::now() > until) {
          throw;
        }
        std::this_thread::yield();
      }
    }
  }

  void send_frames(const std::vector<Bytes>& frames) {
    for (std::size_t i = 0; i < frames.size(); ++i) {
      const auto flags = i + 1 < frames.size() ? zmq::send_flags::sndmore : zmq::send_flags::none;
      if (!send(zmq::buffer(frames[i].data(), frames[i].size()), flags)) {
        throw std::runtime_error("cannot send");
      }
    }
  }

  std::vector<Bytes> receive_frames() {
    std::vector<Bytes> frames;
    zmq::message_t frame;
    do {
      if (!recv(frame)) {
        throw std::runtime_error("nothing received");
      }
      const auto* data = static_cast<const std::byte*>(frame.data());
      frames.emplace_back(data, data + frame.size());
    } while (frame.more());
    return frames;
  }

  /// Receives a message whose last frame is a side message.
  SideMessage receive_message() { return parse_side_message(receive_frames().back()); }

  /// Sends and receives as a plain REQ peer does.
  SideMessage exchange(const Bytes& request) {
    send_frames({request});
    const auto frames = receive_frames();
    EXPECT_EQ(frames.size(), 1U);
    return parse_side_message(frames.back());
  }
};

}  // namespace kvferry::test
