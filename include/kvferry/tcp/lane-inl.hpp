// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/lane.hpp>

#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <asio/post.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <span>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/known_executor.hpp>
#include <kvferry/tcp/tls_socket.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Bytes in one call that sends: a whole frame. In calls of 256 KiB the same bytes take a fifth to a third longer
/// (docs/performance.md), and a call that moves more doesn't gain.
inline constexpr std::size_t send_step_bytes = max_chunk_bytes;
/// The same of a connection that the CPU encrypts. With what its records add it fits one packet within a host (65,483
/// bytes): 64 KiB would take a second one for the last hundred bytes. Memory that isn't there is found within `fault_reach`,
/// with the quarter of a step that may be added.
inline constexpr std::size_t encrypted_step_bytes = std::size_t{63} << 10;
/// Bytes in one call that receives: many enough that the call itself doesn't count.
inline constexpr std::size_t receive_step_bytes = std::size_t{256} << 10;
/// IOV_MAX on Linux.
inline constexpr std::size_t max_pieces = 1024;
/// Bytes that the reactor's thread moves on one lane before it looks after the others.
inline constexpr std::size_t turn_bytes = std::size_t{4} << 20;
/// Of what a peer said before its connection broke so much is still listened to: more than there is in any socket, but a peer
/// may go on talking over a connection that it doesn't listen to any more.
inline constexpr std::size_t last_words_bytes = std::size_t{64} << 20;
/// Bytes that a caller who doesn't wait sends on its own thread, unless that is one of the executor's: an operation's first
/// bytes, not its whole.
inline constexpr std::size_t caller_bytes = std::size_t{256} << 10;
/// A call that moves nothing because some of its memory isn't there has failed within its first so many bytes: the
/// kernel copies by no larger pieces.
inline constexpr std::size_t fault_reach = std::size_t{128} << 10;
/// A round of the driver counts as so many bytes, besides those that it moves.
inline constexpr std::size_t round_cost = 1024;
/// A received frame counts as so many bytes, besides its own: dealing with one takes as long as moving some KiB. Else a
/// turn of small ones would last for tens of milliseconds.
inline constexpr std::size_t frame_cost = 4096;
/// A piece of memory that is read or written counts as so many bytes, besides its own: a frame of some hundred bytes
/// may have a thousand of them, of a byte each.
inline constexpr std::size_t piece_cost = 64;
/// A received record of TLS's counts as so many bytes, besides its own: it may have one or none, and is decrypted all the same.
inline constexpr std::size_t record_cost = 512;
/// An operation that timed out in less than this says nothing about its connection.
inline constexpr std::chrono::seconds least_silent_time{1};
/// A peer within a frame sends at least so many bytes in the time that it has for them.
inline constexpr std::uint64_t least_progress = std::uint64_t{64} << 10;

KVFERRY_INLINE std::string address(const asio::ip::tcp::endpoint& endpoint) {
  auto ip = endpoint.address();
  if (ip.is_v6() && ip.to_v6().is_v4_mapped()) {
    ip = asio::ip::make_address_v4(asio::ip::v4_mapped, ip.to_v6());
  }
  return HostPort{ip.to_string(), endpoint.port()}.to_string();
}

KVFERRY_INLINE std::string local_address_of(const asio::ip::tcp::socket& socket) {
  std::error_code ec;
  const auto endpoint = socket.local_endpoint(ec);
  return ec ? std::string("?") : address(endpoint);
}

KVFERRY_INLINE std::string congestion_control_of(asio::ip::tcp::socket& socket) {
  std::array<char, 16> name{};  // TCP_CA_NAME_MAX
  socklen_t size = name.size();
  if (::getsockopt(socket.native_handle(), IPPROTO_TCP, TCP_CONGESTION, name.data(), &size) != 0) {
    return "?";
  }
  return {name.data(), ::strnlen(name.data(), size)};
}

KVFERRY_INLINE std::string remote_address_of(const asio::ip::tcp::socket& socket) {
  std::error_code ec;
  const auto endpoint = socket.remote_endpoint(ec);
  return ec ? std::string("?") : address(endpoint);
}

/// The kernel's own deadlines (TCP_USER_TIMEOUT, keepalive) aren't the operations'. The others are TLS's.
KVFERRY_INLINE std::error_code last_error(const Socket& socket) {
  switch (errno) {
    case EPROTO: return socket.brings_descriptors() ? errc::protocol_violation : errc::connection_lost;
    case ETIMEDOUT:
    case EBADMSG:
    case ENOMEM:
    case EIO: return errc::connection_lost;
    case senseless_peer: return errc::protocol_violation;
    default: return {errno, std::system_category()};
  }
}

KVFERRY_INLINE std::string last_reason(const Socket& socket) {
  switch (errno) {
    case ETIMEDOUT: return "the peer's host has not answered for too long";
    case EPROTO:
      if (socket.brings_descriptors()) {
        return "the peer passed descriptors of other things than files in memory, or too many";
      }
      return "the encrypted connection ended without the peer's word";
    case EBADMSG: return "what came is not what the peer encrypted, or not what TLS is used for here";
    case EIO: return "OpenSSL could not encrypt it";
    case senseless_peer: return "the peer says of its ring, or of this side's, what can't be";
    default: return std::error_code(errno, std::system_category()).message();
  }
}

}  // namespace internal

KVFERRY_INLINE Lane::Connection connection_of(asio::ip::tcp::socket socket, std::unique_ptr<TlsStream> tls) {
  Lane::Connection connection{socket.get_executor(), nullptr, local_address_of(socket), remote_address_of(socket),
                              congestion_control_of(socket)};
  if (tls) {
    connection.encryption = tls->description();
  }
  // Owned by the one or the other all the time: there may be no memory for the lane's socket.
  kvferry::Descriptor descriptor(socket.release());
  if (tls) {
    connection.socket = std::make_shared<TlsSocket>(descriptor.get(), std::move(tls));
  } else {
    connection.socket = std::make_shared<Socket>(descriptor.get());
  }
  descriptor.release();
  return connection;
}

KVFERRY_INLINE Lane::Lane(asio::ip::tcp::socket socket, std::shared_ptr<kit::LinkHost> host, Options options,
                          std::weak_ptr<Owner> owner)
    : Lane(connection_of(std::move(socket)), std::move(host), std::move(options), std::move(owner)) {}

KVFERRY_INLINE Lane::Lane(Connection connection, std::shared_ptr<kit::LinkHost> host, Options options,
                          std::weak_ptr<Owner> owner)
    : local_(std::move(connection.local)),
      remote_(std::move(connection.remote)),
      congestion_control_(std::move(connection.congestion_control)),
      encryption_(std::move(connection.encryption)),
      by_cpu_(connection.socket->by_cpu()),
      hears_bells_(connection.socket->hears_bells()),
      descriptors_(connection.socket->descriptors()),
      options_(std::move(options)),
      executor_(std::move(connection.executor)),
      host_(std::move(host)),
      socket_(std::move(connection.socket)),
      drain_timer_(executor_),
      protocol_(host_, options_.buffers ? options_.buffers->take() : ReadAhead::unprotected(FrameReader::read_ahead),
                options_.memory, socket_->to_buffer()),
      owner_(std::move(owner)),
      attend_timer_(executor_),
      frame_timer_(executor_) {}

template <class Change>
void Lane::change(Change change_engine, std::size_t budget) {
  drive(
      budget, [] {}, [&](auto step, auto released) { driver_.change_and_drive(change_engine, step, released); });
}

KVFERRY_INLINE void Lane::run(std::span<const std::byte> first) {
  change(
      [&] {
        if (failed_) {
          return;
        }
        running_ = true;
        readable_ = by_cpu_;  // it may have read on, past what was said before the lane
        try {
          protocol_.say(first);
          protocol_.region_added();  // since the handshake was made
          std::error_code ec;
          options_.events->add(socket_->descriptor(), shared_from_this(), ec);
          if (ec) {
            fail(ec, "waiting for " + remote_ + ": " + ec.message());
          }
        } catch (const std::exception& error) {
          fail_for(error);  // the link is its peer's already
        }
      },
      turn_bytes);
}

KVFERRY_INLINE void Lane::start(std::shared_ptr<StripedOperation> batch, ObjectRange range,
                                std::optional<std::shared_ptr<Socket>>* led) {
  const auto lead = [&] {
    become_leader();
    led->emplace(socket_);
    led = nullptr;
  };
  // A thread that becomes the driver at once doesn't need the inbox for its own work.
  const auto begin = [&] {
    if (led != nullptr) {
      lead();
    }
    if (batch) {
      try {
        protocol_.start(std::exchange(batch, nullptr), range);
      } catch (const std::exception& error) {
        fail_for(error);
      }
    }
  };
  bool drove = false;
  // The parts of a striped operation are for several threads of the executor.
  bool may_go_on = batch && batch->parts() == 1;
  drive(
      caller_bytes, begin, [&](auto step, auto released) { drove = driver_.drive(step, released); }, &may_go_on);
  if (led != nullptr) {
    driver_.change(lead);
  }
  if (!drove && batch) {
    driver_.put([&](Inbox& inbox) { inbox.starts.push_back({std::move(batch), range}); });
    drive(caller_bytes);
  }
}

KVFERRY_INLINE void Lane::start_aside(std::shared_ptr<StripedOperation> batch, ObjectRange range) {
  driver_.put([&](Inbox& inbox) { inbox.starts.push_back({std::move(batch), range}); });
  try {
    asio::post(executor_, [self = shared_from_this()] { self->drive_on_io_thread(); });
  } catch (const std::exception&) {
    drive(caller_bytes);  // there is no memory to have another thread do it
  }
}

KVFERRY_INLINE void Lane::stop(std::shared_ptr<kit::Operation> operation) {
  driver_.put([&](Inbox& inbox) { inbox.stops.push_back(std::move(operation)); });
  drive(caller_bytes);
}

KVFERRY_INLINE void Lane::probe(std::function<void()> answered) {
  driver_.put([&](Inbox& inbox) { inbox.probes.push_back(std::move(answered)); });
  drive(caller_bytes);
}

KVFERRY_INLINE void Lane::fence(std::function<void()> done) {
  driver_.put([&](Inbox& inbox) { inbox.fences.push_back(std::move(done)); });
  drive(caller_bytes);
}

KVFERRY_INLINE void Lane::region_added() {
  driver_.put([](Inbox& inbox) { inbox.region_added = true; });
  drive(caller_bytes);
}

KVFERRY_INLINE void Lane::region_removed(std::uint32_t number, std::function<void()> done) {
  driver_.put([&](Inbox& inbox) { inbox.removed_regions.emplace_back(number, std::move(done)); });
  drive(caller_bytes);
}

KVFERRY_INLINE void Lane::rest() {
  driver_.put([](Inbox& inbox) { inbox.rest = true; });
  drive(turn_bytes);
}

KVFERRY_INLINE void Lane::socket_ready(bool readable, bool writable, bool broken) {
  driver_.put([&](Inbox& inbox) {
    inbox.readable |= readable;
    inbox.writable |= writable;
    inbox.broken |= broken;
  });
  drive_on_io_thread();
}

KVFERRY_INLINE void Lane::drive_on_io_thread() {
  options_.io_rank->note_this_thread();
  drive(turn_bytes);
}

KVFERRY_INLINE void Lane::drive(std::size_t budget) {
  drive(
      budget, [] {}, [this](auto step, auto released) { driver_.drive(step, released); });
}

template <class First, class With>
void Lane::drive(std::size_t budget, First first, With with, bool* may_go_on) {
  std::optional<std::size_t> left;
  with(
      [&](std::optional<Inbox> taken) {
        take(std::move(taken));
        first();
        if (!left) {
          left = leader_ == std::this_thread::get_id() ? turn_bytes : budget;
        }
        return work(*left, may_go_on);
      },
      [&](const Driven& driven) {
        const bool goes_on = let_go(driven);
        if (goes_on && driven.more) {
          left.reset();
        }
        return goes_on;
      });
}

/// Memory may be used up: then the lane is broken, and what was in the inbox ends with it.
KVFERRY_INLINE void Lane::take(std::optional<Inbox> taken) {
  if (!taken) {
    return;
  }
  try {
    apply(*std::move(taken));
  } catch (const std::exception& error) {
    fail_for(error);
  }
}

KVFERRY_INLINE Lane::Driven Lane::work(std::size_t& budget, bool* may_go_on) {
  bool more = false;
  try {
    more = move_bytes(budget);
    // One of the executor's threads goes on: this one, if it is one. Else other lanes would have their turns first. Then the begun
    // batches of all lie in sockets at once, and of a hundred peers that is probably more than a CPU's cache holds.
    if (more && may_go_on != nullptr && *may_go_on && detail::runs_in_this_thread(executor_)) {
      *may_go_on = false;
      options_.io_rank->note_this_thread();
      budget = turn_bytes;
      more = move_bytes(budget);
    }
  } catch (const std::exception& error) {
    fail_for(error);  // memory is used up
  }
  if (more) {
    writable_ = true;  // no event says that there is room while there is always something to receive
  }
  // A leader waits for what it moves, and goes on at once where it stops here.
  const bool leads = leader_ == std::this_thread::get_id();
  return done(more && !watched_ && !leads);
}

KVFERRY_INLINE Lane::Driven Lane::done(bool more) {
  return {more, std::exchange(told_owner_, nullptr), failed_ && outlived_ ? std::move(outlived_->owner) : nullptr};
}

KVFERRY_INLINE bool Lane::let_go(const Driven& driven) {
  if (driven.told_owner) {
    driven.told_owner->lane_broken(failure_, failure_why_);
  }
  if (!driven.more) {
    return true;
  }
  try {
    asio::post(executor_, [self = shared_from_this()] { self->drive_on_io_thread(); });
    return false;
  } catch (const std::exception&) {
    // There is no memory to have another thread go on: this one does.
    driver_.put([](Inbox& inbox) { inbox.readable = true; });
    return true;
  }
}

KVFERRY_INLINE bool Lane::move_bytes(std::size_t& budget, Role role) {
  for (;;) {
    if (auto taken = driver_.take()) {
      apply(*std::move(taken));
    }
    // Each round costs something, so that a flood of small operations ends a turn as well.
    budget -= std::min(budget, round_cost);
    if (failed_ || !running_) {
      return false;
    }
    if (budget == 0) {
      update_drain_timer();
      return true;
    }
    const Step received = receive_step(budget);
    const Step sent = failed_ ? Step::nothing : send_step(budget);
    const Step copied = failed_ || !options_.memory ? Step::nothing : copy_step(budget);
    if (received == Step::progress || sent == Step::progress || copied == Step::progress) {
      continue;
    }
    if (failed_) {
      return false;
    }
    update_drain_timer();
    update_frame_timer();
    if (wait_for_more(role)) {
      return false;
    }
    readable_ = true;
    writable_ = true;
  }
}

KVFERRY_INLINE void Lane::apply(Inbox taken) {
  if (taken.readable || taken.writable) {
    armed_ = 0;
    tired_ = false;
    readable_ |= taken.readable;
    writable_ |= taken.writable || hears_bells_;
    if (hears_bells_ && socket_) {
      socket_->woken();
    }
    calls_in_a_row_ = 0;  // what the peer begins comes between them
  }
  if (taken.attend) {
    attend();
  }
  if (taken.broken) {
    protocol_.peer_gone();
  }
  if (taken.rest) {
    watched_ = false;
    tired_ = true;
  }
  // News of regions go first: what is started here later may speak of them.
  if (taken.region_added) {
    protocol_.region_added();
  }
  for (auto& [number, done] : taken.removed_regions) {
    protocol_.region_removed(number, std::move(done));
  }
  for (auto& start : taken.starts) {
    protocol_.start(std::move(start.batch), start.range);
  }
  for (auto& answered : taken.probes) {
    protocol_.probe(std::move(answered));
  }
  if (!taken.stops.empty()) {
    stop_operations(taken.stops);
  }
  for (auto& done : taken.fences) {
    protocol_.fence(std::move(done));
  }
  if (taken.drain_expired) {
    drain_timer_armed_ = false;
    drain_expired();
  }
  if (taken.frame_expired) {
    frame_expired();
  }
  if (taken.writes_ended) {
    protocol_.answer_fence();
  }
}

/// Not by the thread that is told: it may hold locks.
KVFERRY_INLINE void Lane::await_writes() {
  host_->when_writes_ended([weak = weak_from_this(), executor = executor_] {
    try {
      asio::post(executor, [weak] {
        if (const auto self = weak.lock()) {
          self->driver_.put([](Inbox& inbox) { inbox.writes_ended = true; });
          self->drive(caller_bytes);
        }
      });
    } catch (const std::exception&) {
      // Memory is used up: whoever drives the lane next finds it.
      if (const auto self = weak.lock()) {
        self->driver_.put([](Inbox& inbox) { inbox.writes_ended = true; });
      }
    }
  });
}

KVFERRY_INLINE void Lane::stop_operations(const std::vector<std::shared_ptr<kit::Operation>>& operations) {
  // The peer's last frames may still be in the socket.
  std::size_t unlimited = receive_step_bytes;
  if (running_ && !failed_) {
    readable_ = true;
    (void)receive_step(unlimited);
  }
  bool dead = false;
  for (const auto& operation : operations) {
    if (!dead && !failed_ && protocol_.looks_dead(*operation, least_silent_time, socket_->holds_back())) {
      dead = true;
      announce_failure(errc::connection_lost);
    }
    protocol_.stop(*operation);
  }
  if (dead) {
    fail(errc::connection_lost, "nothing came from the peer while an operation waited for its whole time");
  }
}

KVFERRY_INLINE void Lane::drain_expired() {
  const auto since = protocol_.draining_since();
  if (since && !failed_ && kit::Clock::now() - *since >= options_.drain_timeout) {
    fail(errc::connection_lost,
         "the peer did not deal in time with what was sent of an operation that has been stopped");
  }
  if (outlived_ && !failed_ && kit::Clock::now() - outlived_->since >= options_.drain_timeout) {
    fail(outlived_->cause, outlived_->why);
  }
}

}  // namespace kvferry::tcp
