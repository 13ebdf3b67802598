// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include "channel_pair.hpp"
#include "init_question.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

inline std::error_code write_one(Node& from, const std::string& peer) {
  std::error_code ec;
  from.channel->batched_write(from.pages(1), {.peer_id = peer, .remote_indexes = indexes(1)}, ec);
  return ec;
}

inline std::error_code connect(Node& from, const std::string& own_id, const std::string& peer, const std::string& url,
                               std::string* diagnostic = nullptr) {
  std::error_code ec;
  from.channel->lazy_init_peer_connection(own_id, peer, url, {}, {.diagnostic = diagnostic}, ec);
  return ec;
}

/// A peer that is connected has a second to answer when somebody says that he is that peer, or that it is elsewhere. A busy machine may
/// keep it from that: then it is taken for a dead one, as it should be.
class SecondToAnswer {
 public:
  [[nodiscard]] bool is_over() const { return std::chrono::steady_clock::now() - began_ >= std::chrono::seconds(1); }

 private:
  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

/// Whether somebody is refused who says that he is a connected peer, which answers. False only where it came to nothing, as above.
template <class Call>
[[nodiscard]] bool is_refused_for_one_that_lives(Call call) {
  const SecondToAnswer second;
  const std::error_code ec = call();
  if (!ec && second.is_over()) {
    return false;
  }
  EXPECT_EQ(ec, errc::identity_conflict) << ec.message();
  return true;
}

/// Tries until what is to be shown has been: `shown` begins from the beginning each time.
template <class Shown>
void show_in_the_end(Shown shown) {
  for (int tries = 0; tries < 20; ++tries) {
    if (shown()) {
      return;
    }
  }
  ADD_FAILURE() << "a machine this busy shows nothing";
}

/// Asks "b" as a stranger who says that he is "a". @return the answer.
inline std::pair<std::error_code, std::optional<kit::InitAnswer>> ask_as_a(Node& stranger, Node& b,
                                                                           const kit::InitQuestion& question) {
  std::error_code ec;
  const auto answer =
      stranger.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(question), {}, ec);
  return {ec, ec ? std::nullopt : std::optional(decode_side_message<kit::InitAnswer>(answer))};
}

/// Asks as a stranger who says that he is somebody else. @return the answer.
inline auto ask_as(Node& stranger, const std::string& his, Node& asked, const std::string& its,
                   std::uint64_t incarnation) {
  auto made = question();
  made.sender_id = his;
  made.receiver_id = its;
  made.incarnation = incarnation;
  made.secret = Bytes(16, std::byte{1});
  return ask_as_a(stranger, asked, made);
}

inline std::uint64_t ask_who(Node& stranger, Node& asked) {
  auto made = question();
  made.who = true;
  const auto [ec, answer] = ask_as_a(stranger, asked, made);
  EXPECT_FALSE(ec) << ec.message();
  return answer ? answer->incarnation : 0;
}

inline kit::InitQuestion question_as_a(std::uint64_t incarnation) {
  auto made = question();
  made.sender_id = "a";
  made.incarnation = incarnation;
  made.secret = Bytes(16, std::byte{1});
  return made;
}

/// A thread of a channel's, which stops and goes on as a process does that gets SIGSTOP and SIGCONT.
class FreezableThread {
 public:
  FreezableThread() : work_(context_.get_executor()) { go_on(); }
  ~FreezableThread() {
    work_.reset();
    thread_.join();
  }
  FreezableThread(const FreezableThread&) = delete;
  FreezableThread& operator=(const FreezableThread&) = delete;

  [[nodiscard]] TcpOptions options() {
    TcpOptions options;
    options.executor = context_.get_executor();
    return options;
  }
  void freeze() {
    context_.stop();
    thread_.join();
  }
  void go_on() {
    context_.restart();
    thread_ = std::thread([this] { context_.run(); });
  }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::thread thread_;
};

}  // namespace kvferry::tcp::testing
