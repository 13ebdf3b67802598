// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include "scheduler.hpp"

namespace kvferry::inline KVFERRY_ABI::schedules {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

inline constexpr std::size_t page_size = 512;
inline constexpr std::size_t page_count = 64;
/// The contents of memory that nobody may touch.
inline constexpr std::byte quiet{0xEE};

inline std::uint64_t dice(std::uint64_t sides) { return Scheduler::current()->dice(sides); }

/// A channel, and memory that its peers may reach. What a thread of the scheduler's does here without a lock, no other
/// interrupts.
class Side {
 public:
  explicit Side(TcpOptions options) : memory_(page_count * page_size, quiet) {
    options.regions = {{memory_.data(), memory_.size(), page_size}};
    channel.emplace(std::move(options));
  }

  [[nodiscard]] MutableBuffer page(std::uint64_t index) { return {memory_.data() + index * page_size, page_size}; }

  /// Pages that nobody uses. @return empty if there aren't so many.
  [[nodiscard]] std::vector<std::uint64_t> lend(std::size_t count) {
    std::vector<std::uint64_t> pages;
    for (std::size_t tried = 0; tried < page_count && pages.size() < count; ++tried) {
      next_ = (next_ + 1) % page_count;  // so that each rests for a while
      if (!lent_.at(next_)) {
        pages.push_back(next_);
      }
    }
    if (pages.size() < count) {
      return {};
    }
    for (const auto page : pages) {
      lent_.at(page) = true;
    }
    return pages;
  }
  void give_back(const std::vector<std::uint64_t>& pages) {
    for (const auto index : pages) {
      std::ranges::fill(page(index), quiet);
      lent_.at(index) = false;
    }
  }
  void expect_quiet() {
    for (std::uint64_t index = 0; index < page_count; ++index) {
      if (!lent_.at(index)) {
        EXPECT_TRUE(std::ranges::all_of(page(index), [](std::byte byte) { return byte == quiet; }))
            << "page " << index << " was written to after its operation had ended";
      }
    }
  }

 private:
  std::vector<std::byte> memory_;
  std::vector<bool> lent_ = std::vector<bool>(page_count);
  std::size_t next_ = 0;

 public:
  std::optional<TcpTransferChannel> channel;  ///< Gone before its memory.
};

/// A call that was made, and how it ended.
struct Call {
  TransferKind kind = TransferKind::write;
  std::shared_ptr<Side> peer;
  std::vector<std::uint64_t> pages;  ///< At the peer.
  std::vector<std::byte> buffer;
  std::vector<std::byte> expected;
  asio::cancellation_signal signal;
  Clock::time_point deadline;
  int ends = 0;
  std::error_code ec;
  std::uint64_t notification = 0;  ///< 0: none.
  std::uint64_t sent = 0;          ///< The number of a send; 0: it is none.
  std::uint64_t got = 0;           ///< Which send a recv that succeeded has got.
};

/// A thread of the channel's user: starts calls, and runs what comes of them.
class User {
 public:
  User(std::shared_ptr<Side> side, std::string peer_id) : side_(std::move(side)), peer_id_(std::move(peer_id)) {}
  User(const User&) = delete;
  User& operator=(const User&) = delete;

  template <class Handler>
  auto bind(Call& call, Handler handler) {
    return asio::bind_executor(context_, asio::bind_cancellation_slot(call.signal.slot(), std::move(handler)));
  }

  /// Writes or reads pages of the peer's.
  /// @return null if there are no pages left.
  std::shared_ptr<Call> transfer(TransferKind kind, const std::shared_ptr<Side>& peer, std::size_t count,
                                 milliseconds timeout, std::uint64_t notification = 0) {
    auto call = make_call(kind, peer, count, timeout, notification);
    if (call) {
      side_->channel->async_transfer(
          request_of(*call, timeout),
          bind(*call, [this, call](std::error_code ec, std::size_t moved) { end(*call, ec, moved); }));
    }
    return call;
  }

  /// Likewise, and this thread waits until it has ended.
  std::shared_ptr<Call> blocking_transfer(TransferKind kind, const std::shared_ptr<Side>& peer, std::size_t count,
                                          milliseconds timeout, std::uint64_t notification = 0) {
    auto call = make_call(kind, peer, count, timeout, notification);
    if (call) {
      const TransferRequest request = request_of(*call, timeout);
      TransferSpec spec;
      spec.peer_id = peer_id_;
      spec.remote_indexes = request.remote_indexes;
      spec.timeout = timeout;
      spec.notification = request.notification;
      std::error_code ec;
      const std::size_t moved = kind == TransferKind::write ? side_->channel->batched_write(request.objects, spec, ec)
                                                            : side_->channel->batched_read(request.objects, spec, ec);
      end(*call, ec, moved);
      last_block_ = Clock::now();
    }
    return call;
  }

  /// Sends two objects, or receives those of a send of the peer's with the same tag.
  std::shared_ptr<Call> pair_up(TransferKind kind, std::uint64_t tag, milliseconds timeout) {
    auto call = std::make_shared<Call>();
    call->kind = kind;
    call->deadline = Clock::now() + timeout;
    call->buffer.resize(2 * page_size, quiet);
    if (kind == TransferKind::send) {
      call->sent = ++last_sent();
      mark(call->buffer, call->sent);
    }
    calls_.push_back(call);
    TransferRequest request;
    request.kind = kind;
    request.peer_id = peer_id_;
    request.tag = tag;
    request.timeout = timeout;
    for (std::size_t i = 0; i < 2; ++i) {
      request.objects.emplace_back(call->buffer.data() + i * page_size, page_size);
    }
    side_->channel->async_transfer(std::move(request), bind(*call, [this, call](std::error_code ec, std::size_t) {
                                     if (!ec && call->kind == TransferKind::recv) {
                                       take(*call);
                                     }
                                     note_end(*call, ec);
                                     std::ranges::fill(call->buffer, quiet);
                                   }));
    return call;
  }

  std::shared_ptr<Call> receive_notification(milliseconds timeout, std::map<std::uint64_t, int>& received) {
    auto call = std::make_shared<Call>();
    call->deadline = Clock::now() + timeout;
    calls_.push_back(call);
    side_->channel->async_receive_notification(
        timeout, bind(*call, [this, call, &received](std::error_code ec, const Notification& notification) {
          note_end(*call, ec);
          if (!ec) {
            ++received[number_of(notification)];
          }
        }));
    return call;
  }

  std::shared_ptr<Call> fence(milliseconds timeout) {
    auto call = std::make_shared<Call>();
    call->deadline = Clock::now() + timeout;
    calls_.push_back(call);
    side_->channel->async_fence(peer_id_, timeout,
                                bind(*call, [this, call](std::error_code ec) { note_end(*call, ec); }));
    return call;
  }

  std::shared_ptr<Call> connect(const std::string& own_id, const std::string& url, milliseconds timeout) {
    auto call = std::make_shared<Call>();
    call->deadline = Clock::now() + timeout;
    calls_.push_back(call);
    side_->channel->async_lazy_init_peer_connection(
        own_id, peer_id_, url, std::nullopt, InitSpec{.timeout = timeout},
        bind(*call, [this, call](std::error_code ec, const std::optional<SideMessage>&) { note_end(*call, ec); }));
    return call;
  }

  /// On this thread, where the handlers run. Does nothing for a call that has ended.
  static void cancel(Call& call) { call.signal.emit(asio::cancellation_type::all); }
  /// Runs what handlers are ready.
  void look() {
    context_.restart();
    context_.poll();
  }
  /// Runs handlers until all calls have ended.
  void finish() {
    context_.restart();
    context_.run();
    for (const auto& call : calls_) {
      EXPECT_EQ(call->ends, 1);
      const bool touched = std::ranges::any_of(call->buffer, [](std::byte byte) { return byte != quiet; });
      EXPECT_FALSE(touched) << "a buffer was written to after its operation had ended";
    }
  }

  [[nodiscard]] const std::vector<std::shared_ptr<Call>>& calls() const noexcept { return calls_; }
  [[nodiscard]] Side& side() noexcept { return *side_; }

  static std::uint64_t number_of(const Notification& notification) {
    std::uint64_t number = 0;
    EXPECT_EQ(notification.payload.size(), sizeof(number));
    std::memcpy(&number, notification.payload.data(), std::min(sizeof(number), notification.payload.size()));
    return number;
  }

  /// How much longer than its timeout a call may take; nothing: not checked.
  std::optional<milliseconds> lateness;

 private:
  std::shared_ptr<Call> make_call(TransferKind kind, const std::shared_ptr<Side>& peer, std::size_t count,
                                  milliseconds timeout, std::uint64_t notification) {
    auto call = std::make_shared<Call>();
    call->kind = kind;
    call->peer = peer;
    call->pages = peer->lend(count);
    call->notification = notification;
    call->deadline = Clock::now() + timeout;
    if (call->pages.empty()) {
      return nullptr;
    }
    call->expected.resize(count * page_size);
    std::ranges::generate(call->expected,
                          [byte = 0U, seed = ++seed_]() mutable { return std::byte(byte++ * 7 + seed); });
    if (kind == TransferKind::write) {
      call->buffer = call->expected;
    } else {
      call->buffer.resize(count * page_size);
      for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(peer->page(call->pages[i]).data(), call->expected.data() + i * page_size, page_size);
      }
    }
    calls_.push_back(call);
    return call;
  }

  TransferRequest request_of(Call& call, milliseconds timeout) const {
    TransferRequest request;
    request.kind = call.kind;
    request.peer_id = peer_id_;
    request.remote_indexes = call.pages;
    request.timeout = timeout;
    for (std::size_t i = 0; i < call.pages.size(); ++i) {
      request.objects.emplace_back(call.buffer.data() + i * page_size, page_size);
    }
    if (call.notification != 0) {
      request.notification.resize(sizeof(call.notification));
      std::memcpy(request.notification.data(), &call.notification, sizeof(call.notification));
    }
    return request;
  }

  /// Fills what is sent so that the receiver can tell which send it was, and whether all of it came.
  static void mark(std::vector<std::byte>& buffer, std::uint64_t sent) {
    for (std::size_t i = 0; i + sizeof(sent) <= buffer.size(); i += sizeof(sent)) {
      const std::uint64_t word = sent * 1000 + i;
      std::memcpy(buffer.data() + i, &word, sizeof(word));
    }
  }
  static void take(Call& call) {
    std::uint64_t word = 0;
    std::memcpy(&word, call.buffer.data(), sizeof(word));
    call.got = word / 1000;
    std::vector<std::byte> expected(call.buffer.size());
    mark(expected, call.got);
    EXPECT_EQ(call.buffer, expected) << "a recv that succeeded got something else than one send's objects";
  }
  static std::uint64_t& last_sent() {
    static std::uint64_t last = 0;
    return last;
  }

  void note_end(Call& call, std::error_code ec) {
    ++call.ends;
    call.ec = ec;
    if (lateness) {
      // A handler has to wait for a blocking call on its thread.
      EXPECT_LE(Clock::now(), std::max(call.deadline, last_block_) + *lateness) << "ended late, with " << ec.message();
    }
  }

  void end(Call& call, std::error_code ec, std::size_t moved) {
    note_end(call, ec);
    if (!ec) {
      EXPECT_EQ(moved, call.pages.size());
      for (std::size_t i = 0; i < call.pages.size(); ++i) {
        const auto expected = std::span(call.expected).subspan(i * page_size, page_size);
        const auto got = call.kind == TransferKind::write
                             ? call.peer->page(call.pages[i])
                             : MutableBuffer(call.buffer).subspan(i * page_size, page_size);
        EXPECT_TRUE(std::ranges::equal(got, expected)) << "page " << i << " of a transfer that succeeded";
      }
    }
    std::ranges::fill(call.buffer, quiet);
    if (call.kind == TransferKind::read || ec != condition::may_still_land) {
      call.peer->give_back(call.pages);
    }
  }

  const std::shared_ptr<Side> side_;
  const std::string peer_id_;
  asio::io_context context_{1};
  std::vector<std::shared_ptr<Call>> calls_;
  Clock::time_point last_block_;
  unsigned seed_ = 0;
};

/// Cuts all connections between the sides, of which there are some, one after the other.
void cut_connections();
/// Descriptors of connections, listening sockets among them.
[[nodiscard]] std::size_t open_sockets();

}  // namespace kvferry::schedules
