// SPDX-License-Identifier: Apache-2.0
#pragma once

//
// Passes bytes from peers to ZeroMQ and back, and bounds how many.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <optional>

#include <kvferry/handshake/handshake_gate.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Of ZMTP 3 (https://rfc.zeromq.org/spec/23).
inline constexpr std::size_t greeting_bytes = 64;

}  // namespace internal

/// How many bytes of the peer's may be handed on.
KVFERRY_INLINE std::size_t HandshakeGate::allowance(const Connection& connection) const {
  if (bounds_.greets_first && connection.greeted < greeting_bytes) {
    return connection.peer_greets ? 0 : 1;  // behind the signature, the byte that ZeroMQ completes its greeting for
  }
  const auto left = [](std::size_t bound, std::size_t used) { return bound > used ? bound - used : 0; };
  const std::size_t own = left(bounds_.connection_bytes, connection.bytes);
  const Source& source = connection.source->second;
  const auto is_first = [&](const std::set<std::uint64_t>& unfinished) {
    return !unfinished.empty() && *unfinished.begin() == connection.number;
  };
  // If all that have begun waited for room, none of them would ever make any.
  const std::size_t of_source = is_first(source.unfinished) ? own : left(bounds_.source_bytes, source.bytes);
  const std::size_t shared = is_first(unfinished_) ? own : std::min(of_source, left(bounds_.total_bytes, bytes_));
  return std::min(own, std::max(shared, left(bounds_.free_bytes, connection.bytes)));
}

KVFERRY_INLINE bool HandshakeGate::pump(Connection& connection) {
  if (connection.phase != Phase::open) {
    return true;
  }
  const bool alive = pump_outward(connection) && (connection.ending || pump_inward(connection));
  if (!alive || (connection.ending && connection.to_outer.empty())) {
    return false;
  }
  watch(connection);
  return true;
}

/// @return false if the connection is over.
KVFERRY_INLINE bool HandshakeGate::pump_inward(Connection& connection) {
  const auto send_some = [&](const char* data, std::size_t size) -> std::optional<std::size_t> {
    const ssize_t sent = ::send(connection.inner.get(), data, size, MSG_NOSIGNAL);
    if (sent < 0 && !would_block()) {
      return std::nullopt;
    }
    return sent < 0 ? 0 : static_cast<std::size_t>(sent);
  };
  if (!connection.to_inner.empty()) {
    const auto sent = send_some(connection.to_inner.data(), connection.to_inner.size());
    if (!sent) {
      return false;
    }
    connection.to_inner.erase(connection.to_inner.begin(),
                              connection.to_inner.begin() + static_cast<std::ptrdiff_t>(*sent));
  }
  // A peer that doesn't take its answers needs no more of them.
  const std::size_t size = std::min(allowance(connection), buffer_.size());
  if (!connection.to_inner.empty() || !connection.to_outer.empty() || size == 0) {
    return true;
  }
  const ssize_t received = ::recv(connection.outer.get(), buffer_.data(), size, MSG_DONTWAIT);
  if (received <= 0) {
    return received < 0 && would_block();
  }
  const auto count = static_cast<std::size_t>(received);
  connection.peer_greets = true;
  add(connection, count);
  const auto sent = send_some(buffer_.data(), count);
  if (sent && *sent < count) {
    connection.to_inner.assign(buffer_.data() + *sent, buffer_.data() + count);
  }
  return sent.has_value();
}

KVFERRY_INLINE bool HandshakeGate::pump_outward(Connection& connection) {
  const auto send_some = [&](const char* data, std::size_t size) {
    const ssize_t sent = ::send(connection.outer.get(), data, size, MSG_NOSIGNAL);
    return sent < 0 && would_block() ? 0 : sent;
  };
  if (!connection.to_outer.empty()) {
    const ssize_t sent = send_some(connection.to_outer.data(), connection.to_outer.size());
    if (sent < 0) {
      return false;
    }
    connection.to_outer.erase(connection.to_outer.begin(), connection.to_outer.begin() + sent);
    // Not for each part of it: who takes a few bytes now and then would never be late.
    if (connection.to_outer.empty()) {
      connection.since = Clock::now();
    }
  }
  if (!connection.to_outer.empty() || connection.ending) {
    return true;
  }
  const ssize_t received = ::recv(connection.inner.get(), buffer_.data(), buffer_.size(), MSG_DONTWAIT);
  if (received <= 0) {
    if (received == 0 || !would_block()) {
      connection.ending = true;
      connection.inner.reset();
    }
    return true;
  }
  was_greeted(connection);
  connection.greeted = std::min(connection.greeted + static_cast<std::size_t>(received), greeting_bytes);
  has_left(connection, static_cast<std::size_t>(received));
  const ssize_t sent = send_some(buffer_.data(), static_cast<std::size_t>(received));
  if (sent < 0) {
    return false;
  }
  if (sent < received) {
    connection.to_outer.assign(buffer_.data() + sent, buffer_.data() + received);
    connection.since = Clock::now();
    sweep_by(deadline(connection));
  }
  return true;
}

KVFERRY_INLINE void HandshakeGate::watch(Connection& connection) {
  const bool open = connection.phase == Phase::open;
  const bool has_room = allowance(connection) > 0;
  const bool reads = open && !connection.ending && connection.to_inner.empty() && connection.to_outer.empty();
  watch_outer(connection, (reads && has_room ? EPOLLIN : 0U) | (open && !connection.to_outer.empty() ? EPOLLOUT : 0U));
  if (reads && !has_room) {
    starved_.insert(connection.number);
  } else {
    starved_.erase(connection.number);
  }
  if (connection.inner) {
    watch_inner(connection, (connection.to_outer.empty() && !connection.ending ? EPOLLIN : 0U) |
                                (!connection.to_inner.empty() && !connection.ending ? EPOLLOUT : 0U));
  }
}

KVFERRY_INLINE void HandshakeGate::watch_outer(Connection& connection, std::uint32_t wants) {
  if (connection.outer_events != wants) {
    epoll_event event{wants, {.u64 = tag_of(connection.number, Role::outer)}};
    ::epoll_ctl(events_.get(), EPOLL_CTL_MOD, connection.outer.get(), &event);
    connection.outer_events = wants;
  }
}

/// Not at all where nothing is wanted of it: that ZeroMQ has hung up would be told again and again, while its last
/// words wait for the peer to take those before.
KVFERRY_INLINE void HandshakeGate::watch_inner(Connection& connection, std::uint32_t wants) {
  if (connection.inner_events != wants) {
    epoll_event event{wants, {.u64 = tag_of(connection.number, Role::inner)}};
    const int change = wants == 0 ? EPOLL_CTL_DEL : connection.inner_events == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
    ::epoll_ctl(events_.get(), change, connection.inner.get(), &event);
    connection.inner_events = wants;
  }
}

KVFERRY_INLINE void HandshakeGate::feed_starved() {
  for (const std::uint64_t number : std::set(starved_)) {
    if (const auto found = connections_.find(number); found != connections_.end()) {
      watch(found->second);
    }
  }
}

KVFERRY_INLINE void HandshakeGate::add(Connection& connection, std::size_t bytes) {
  const bool had_begun = connection.bytes > bounds_.free_bytes;
  connection.bytes += bytes;
  connection.source->second.bytes += bytes;
  bytes_ += bytes;
  if (!had_begun && connection.bytes > bounds_.free_bytes) {
    connection.source->second.unfinished.insert(connection.number);
    unfinished_.insert(connection.number);
    if (connection.has_asked) {
      connection.since = Clock::now();
    }
    sweep_by(deadline(connection));
  }
}

KVFERRY_INLINE void HandshakeGate::release(Connection& connection, std::size_t bytes) {
  bytes = std::min(bytes, connection.bytes);
  connection.bytes -= bytes;
  connection.source->second.bytes -= bytes;
  bytes_ -= bytes;
  if (connection.bytes <= bounds_.free_bytes) {
    connection.source->second.unfinished.erase(connection.number);
    unfinished_.erase(connection.number);
  }
}

KVFERRY_INLINE void HandshakeGate::has_left(Connection& connection, std::size_t bytes) {
  const std::size_t answers = std::min(bytes, connection.unread);
  connection.unread -= answers;
  connection.source->second.unread -= answers;
  unread_ -= answers;
  // Frames that are no answers are ZMTP's own: they answer the peer's greeting, or a heartbeat.
  if (connection.unread == 0) {
    release(connection, bytes - answers);
  }
}

}  // namespace kvferry::kit
