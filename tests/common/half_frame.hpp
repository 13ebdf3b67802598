// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/peer_event.hpp>
#include <kvferry/testing/peer_memory.hpp>
#include <kvferry/transfer_spec.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::testing {

/// A peer that has stopped within a frame: its write began on a caller's thread, which sends less than a frame, and nobody runs the
/// executor that would send the rest.
template <class Channel, class Options>
class HalfFrame {
 public:
  static constexpr std::size_t frame_bytes = std::size_t{1} << 20;
  static constexpr std::chrono::seconds long_enough = kvferry_test::long_enough;

  /// @param base of both sides. @param frame_timeout the receiver's.
  HalfFrame(Options base, std::chrono::milliseconds frame_timeout) : memory_(frame_bytes), source_(frame_bytes, one) {
    base = kvferry_test::patient(std::move(base));
    Options receiving = base;
    receiving.regions = {{memory_.data(), frame_bytes, frame_bytes}};
    receiving.peer_init_url = "tcp://127.0.0.1:0";
    receiving.frame_timeout = frame_timeout;
    receiver_.emplace(std::move(receiving));
    Options sending = std::move(base);
    sending.executor = context_.get_executor();
    sender_.emplace(std::move(sending));
    run();
    sender_->lazy_init_peer_connection("sender", "receiver", receiver_->peer_init_url());
    waiting_ = receiver_->async_batched_recv({{MutableBuffer(received_)}},
                                             {.peer_id = "sender", .timeout = 2 * long_enough, .diagnostic = &why_},
                                             asio::use_future);
    context_.stop();
    thread_.join();
    written_ = sender_->async_batched_write({{MutableBuffer(source_)}},
                                            {.peer_id = "receiver", .remote_indexes = indexes_, .timeout = long_enough},
                                            asio::use_future);
  }
  HalfFrame(const HalfFrame&) = delete;
  HalfFrame& operator=(const HalfFrame&) = delete;
  ~HalfFrame() {
    if (!thread_.joinable()) {
      run();
    }
    receiver_.reset();
    sender_.reset();
    work_.reset();
    thread_.join();
  }

  /// How the receiver's connection to the peer ended; nothing: it lasts.
  [[nodiscard]] std::optional<std::error_code> gone(std::chrono::milliseconds within) {
    const auto until = std::chrono::steady_clock::now() + within;
    for (;;) {
      std::error_code ec;
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
      const PeerEvent event = receiver_->wait_peer_event(std::max(left, std::chrono::milliseconds(0)), ec);
      if (ec) {
        return std::nullopt;
      }
      if (event.kind == PeerEventKind::gone) {
        return event.cause;
      }
    }
  }
  /// Why an operation of the receiver's ended with the connection.
  [[nodiscard]] std::string why() {
    waiting_.wait();
    return why_;
  }

  /// Has the peer go on. @return how its write ended.
  [[nodiscard]] std::error_code go_on() {
    run();
    try {
      written_.get();
      return {};
    } catch (const std::system_error& error) {
      return error.code();
    }
  }
  [[nodiscard]] bool landed() const {
    const UnwatchedAccess unwatched;  // what lands later is ordered by what is sent later
    return memory_ == source_;
  }

 private:
  static constexpr std::byte one{1};

  void run() {
    context_.restart();
    thread_ = std::thread([this] { context_.run(); });
  }

  std::vector<std::byte> memory_;
  std::vector<std::byte> source_;
  const std::vector<std::uint64_t> indexes_{0};
  std::vector<std::byte> received_ = std::vector<std::byte>(1);
  std::string why_;
  asio::io_context context_;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work_{std::in_place,
                                                                                  context_.get_executor()};
  std::thread thread_;
  std::optional<Channel> receiver_;
  std::optional<Channel> sender_;
  std::future<std::size_t> written_;
  std::future<std::size_t> waiting_;
};

}  // namespace kvferry::testing
