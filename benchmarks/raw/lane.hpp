// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <asio/ip/tcp.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "common/job.hpp"
#include "common/region.hpp"
#include "ring.hpp"

namespace bench {

/// How a thread waits for a socket.
enum class Wait : std::uint8_t {
  block,     ///< In the system call.
  poll,      ///< By trying again and again.
  adaptive,  ///< By trying for a while, then in poll(2).
};
NLOHMANN_JSON_SERIALIZE_ENUM(Wait, {{Wait::block, "block"}, {Wait::poll, "poll"}, {Wait::adaptive, "adaptive"}})

/// How a thread tells the kernel what to move.
enum class Io : std::uint8_t {
  calls,           ///< A system call each.
  ring,            ///< By an io_uring.
  ring_zero_copy,  ///< By an io_uring, and the kernel sends out of the region's memory, which is registered with it.
};
NLOHMANN_JSON_SERIALIZE_ENUM(Io, {{Io::calls, "calls"}, {Io::ring, "ring"}, {Io::ring_zero_copy, "ring-zero-copy"}})

struct LaneOptions {
  Wait wait = Wait::block;
  std::size_t lanes = 1;           ///< Connections that each batch is spread over.
  std::size_t step = 0;            ///< Bytes that a system call moves at most; 0: as many as it takes.
  std::size_t send_buffer = 0;     ///< SO_SNDBUF; 0: the system's.
  std::size_t receive_buffer = 0;  ///< SO_RCVBUF; 0: the system's.
  std::uint64_t spin_us = 50;
  std::string congestion;  ///< TCP_CONGESTION; empty: the system's.
  Io io = Io::calls;

  /// Whether system calls wait, which they can where a thread has but one connection.
  [[nodiscard]] bool blocking() const { return wait == Wait::block && lanes == 1; }
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LaneOptions, wait, lanes, step, send_buffer, receive_buffer, spin_us, congestion, io)

/// Where a batch's bytes are to go or come from next.
class PageCursor {
 public:
  PageCursor() = default;
  PageCursor(const Region& region, std::uint64_t first_page, std::span<const std::uint64_t> pages)
      : region_(&region), first_page_(first_page), pages_(pages), at_begin_(true) {}

  [[nodiscard]] bool done() const { return pages_.empty(); }
  [[nodiscard]] bool at_begin() const { return at_begin_; }
  /// The next pieces of memory, of at most `limit` bytes altogether (0: no limit).
  [[nodiscard]] std::span<iovec> window(std::span<iovec> pieces, std::size_t limit) const;
  void advance(std::size_t bytes);

 private:
  const Region* region_ = nullptr;
  std::uint64_t first_page_ = 0;
  std::span<const std::uint64_t> pages_;
  std::size_t offset_ = 0;  ///< In the first of them.
  bool at_begin_ = false;
};

/// One connection. Batches go one way; the other way goes a byte for each, a token: an acknowledgement or a request.
class Lane {
 public:
  Lane(asio::ip::tcp::socket socket, const LaneOptions& options, const Region& region);

  /// Begins another batch.
  void load(const PageCursor& cursor) {
    cursor_ = cursor;
    ++loaded_;
  }
  [[nodiscard]] bool busy() const { return !cursor_.done(); }
  [[nodiscard]] std::uint64_t loaded() const { return loaded_; }
  /// How many batches are through.
  [[nodiscard]] std::uint64_t finished() const { return busy() ? loaded_ - 1 : loaded_; }
  [[nodiscard]] std::uint64_t tokens() const { return tokens_; }
  /// Whether the other side has closed.
  [[nodiscard]] bool ended() const { return ended_; }

  /// Each makes one system call, and says whether it did anything. `wait`: until it can.
  bool send_pages(bool wait);
  bool receive_pages(bool wait);
  bool receive_tokens(bool wait);
  void send_token();

  /// Nothing more will be sent.
  void shut() { socket_.shutdown(asio::ip::tcp::socket::shutdown_send); }
  [[nodiscard]] int descriptor() { return socket_.native_handle(); }

 private:
  Ring* ring();

  asio::ip::tcp::socket socket_;
  std::size_t step_;
  Io io_;
  const Region* region_;
  std::unique_ptr<Ring> ring_;  ///< Made by the thread that uses it: the kernel takes calls from no other.
  PageCursor cursor_;
  std::uint64_t loaded_ = 0;
  std::uint64_t tokens_ = 0;
  bool ended_ = false;
  std::array<iovec, 1024> pieces_{};
};

/// How a thread idles that found nothing to do at any of its lanes.
class Idling {
 public:
  /// @param sending whether it is pages that the lanes send.
  Idling(const LaneOptions& options, bool sending);

  void after(bool worked, std::span<Lane> lanes) {
    if (worked) {
      spinning_ = false;
    } else {
      idle(lanes);
    }
  }

 private:
  void idle(std::span<Lane> lanes);

  Wait wait_;
  bool sending_;
  Clock::duration spin_;
  bool spinning_ = false;
  Clock::time_point since_;
};

}  // namespace bench
