// SPDX-License-Identifier: Apache-2.0
//
// What passes through the gate: bytes from peers to ZeroMQ and back, and how many of them.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <optional>

#include "handshake_gate.hpp"

namespace kvferry::kit {

/// How many bytes of the peer's may be handed on.
std::size_t HandshakeGate::allowance(const Connection& connection) const {
  const auto left = [](std::size_t bound, std::size_t used) { return bound > used ? bound - used : 0; };
  const std::size_t own = left(bounds_.connection_bytes, connection.bytes);
  const std::size_t shared =
      std::min(left(bounds_.source_bytes, connection.source->second.bytes), left(bounds_.total_bytes, bytes_));
  return std::min(own, std::max(shared, left(bounds_.free_bytes, connection.bytes)));
}

bool HandshakeGate::pump(Connection& connection) {
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
bool HandshakeGate::pump_inward(Connection& connection) {
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
  // Who doesn't take its answers needs no more of them.
  const std::size_t size = std::min(allowance(connection), buffer_.size());
  if (!connection.to_inner.empty() || !connection.to_outer.empty() || size == 0) {
    return true;
  }
  const ssize_t received = ::recv(connection.outer.get(), buffer_.data(), size, MSG_DONTWAIT);
  if (received <= 0) {
    return received < 0 && would_block();
  }
  const auto count = static_cast<std::size_t>(received);
  if (connection.bytes == 0 && connection.has_asked) {
    connection.since = Clock::now();
    sweep_by(deadline(connection));
  }
  connection.bytes += count;
  connection.source->second.bytes += count;
  bytes_ += count;
  const auto sent = send_some(buffer_.data(), count);
  if (sent && *sent < count) {
    connection.to_inner.assign(buffer_.data() + *sent, buffer_.data() + count);
  }
  return sent.has_value();
}

bool HandshakeGate::pump_outward(Connection& connection) {
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
    if (sent > 0) {
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

void HandshakeGate::watch(Connection& connection) {
  const bool open = connection.phase == Phase::open;
  const bool has_room = allowance(connection) > 0;
  const bool reads = open && !connection.ending && connection.to_inner.empty() && connection.to_outer.empty();
  watch(connection.outer.get(), tag_of(connection.number, Role::outer), connection.outer_events,
        (reads && has_room ? EPOLLIN : 0U) | (open && !connection.to_outer.empty() ? EPOLLOUT : 0U));
  if (reads && !has_room) {
    starved_.insert(connection.number);
  } else {
    starved_.erase(connection.number);
  }
  if (connection.inner) {
    watch(connection.inner.get(), tag_of(connection.number, Role::inner), connection.inner_events,
          (connection.to_outer.empty() && !connection.ending ? EPOLLIN : 0U) |
              (!connection.to_inner.empty() && !connection.ending ? EPOLLOUT : 0U));
  }
}

void HandshakeGate::watch(int descriptor, std::uint64_t tag, std::uint32_t& has, std::uint32_t wants) {
  if (has == wants) {
    return;
  }
  epoll_event event{wants, {.u64 = tag}};
  ::epoll_ctl(events_.get(), EPOLL_CTL_MOD, descriptor, &event);
  has = wants;
}

void HandshakeGate::feed_starved() {
  for (const std::uint64_t number : std::set(starved_)) {
    if (const auto found = connections_.find(number); found != connections_.end()) {
      watch(found->second);
    }
  }
}

void HandshakeGate::release(Connection& connection, std::size_t bytes) {
  bytes = std::min(bytes, connection.bytes);
  connection.bytes -= bytes;
  connection.source->second.bytes -= bytes;
  bytes_ -= bytes;
}

void HandshakeGate::has_left(Connection& connection, std::size_t bytes) {
  bytes = std::min(bytes, connection.unread);
  connection.unread -= bytes;
  unread_ -= bytes;
}

}  // namespace kvferry::kit
