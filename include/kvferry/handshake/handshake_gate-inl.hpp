// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_gate.hpp>

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <limits>
#include <random>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/descriptor_limit.hpp>
#include <kvferry/detail/listening_socket.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// The bounds of one turn, so that a flood leaves time for all else that the thread does.
inline constexpr int events_a_turn = 64;
inline constexpr std::size_t bytes_a_turn = std::size_t{64} * 1024;
inline constexpr std::chrono::milliseconds full_pause{10};
inline constexpr std::chrono::milliseconds never = std::chrono::hours(24);

[[noreturn]] KVFERRY_INLINE void fail(const char* what) {
  throw std::system_error(errno, std::system_category(), what);
}

KVFERRY_INLINE Descriptor open_spare() { return Descriptor(::eventfd(0, EFD_CLOEXEC)); }

KVFERRY_INLINE std::string random_name() {
  std::random_device device;
  return "kvferry-" + std::to_string(std::uint64_t{device()} << 32 | device()) + "-";
}

}  // namespace internal

KVFERRY_INLINE HandshakeGate::Bounds HandshakeGate::Bounds::of(std::size_t message) {
  constexpr std::size_t around_a_message = 4096;  // ZMTP's own, and an envelope
  constexpr std::size_t least_for_a_source = std::size_t{512} << 10;
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max() / 8;
  Bounds bounds;
  bounds.connection_bytes = std::min(message, most) + around_a_message;
  bounds.source_bytes = std::max(least_for_a_source, bounds.connection_bytes);
  bounds.total_bytes = 4 * bounds.source_bytes;
  bounds.unread_bytes = 2 * bounds.source_bytes;
  bounds.source_unread_bytes = 4 * bounds.source_bytes;
  bounds.total_unread_bytes = 8 * bounds.source_bytes;
  // Larger messages may take longer to come.
  bounds.patience += std::chrono::milliseconds(std::min<std::size_t>(message >> 10, 60'000));
  // Three descriptors each; the rest is for data connections, other channels and all else that the process does.
  bounds.connections = share_of_descriptors(12, 8, 1024);
  return bounds;
}

KVFERRY_INLINE HandshakeGate::HandshakeGate(zmq::socket_ref router, const HostPort& address, const Bounds& bounds,
                                            std::shared_ptr<Refusals> refusals)
    : router_(router),
      bounds_(bounds),
      refusals_(std::move(refusals)),
      process_(::getpid()),
      name_(random_name()),
      events_(::epoll_create1(EPOLL_CLOEXEC)),
      spare_(open_spare()),
      buffer_(bytes_a_turn) {
  if (!events_ || !spare_) {
    fail("no descriptor for the handshake's port");
  }
  // Each rendezvous is good for one connection. With -1 ZeroMQ would forget it by itself, perhaps between two frames of a
  // message that is being received, which it does not survive.
  router_.set(zmq::sockopt::reconnect_ivl, static_cast<int>(never.count()));
  router_.set(zmq::sockopt::handshake_ivl, static_cast<int>(bounds.patience.count()));
  // Unread answers are counted here. ZeroMQ's own bound would drop answers without a word, and they would count for ever.
  router_.set(zmq::sockopt::sndhwm, 0);
  // A process that may have no sockets of the kind is told so here, and not each peer by its connection's end.
  if (!open_rendezvous(0)) {
    fail("no Unix-domain socket for the handshake's port");
  }
  auto [listener, port] = listen_at(address);
  listener_ = std::move(listener);
  port_ = port;
  epoll_event event{EPOLLIN, {.u64 = listener_tag}};
  if (::epoll_ctl(events_.get(), EPOLL_CTL_ADD, listener_.get(), &event) != 0) {
    fail("epoll_ctl");
  }
}

KVFERRY_INLINE HandshakeGate::~HandshakeGate() {
  listener_.reset();
  while (!connections_.empty()) {
    close(connections_.begin());
  }
  retire();
}

KVFERRY_INLINE void HandshakeGate::serve() {
  std::array<epoll_event, events_a_turn> events;
  const int count = ::epoll_wait(events_.get(), events.data(), events_a_turn, 0);
  bool someone_knocks = false;
  for (int i = 0; i < count; ++i) {
    const std::uint64_t tag = events[static_cast<std::size_t>(i)].data.u64;
    if (tag == listener_tag) {
      someone_knocks = true;
      continue;
    }
    const auto found = connections_.find(tag / 4);
    if (found == connections_.end()) {
      continue;
    }
    Connection& connection = found->second;
    const auto role = static_cast<Role>(tag % 4);
    const bool broken = (events[static_cast<std::size_t>(i)].events & (EPOLLERR | EPOLLHUP)) != 0;
    if (role == Role::rendezvous) {
      joined(connection);
    } else if (connection.phase == Phase::silent) {
      read_signature(connection);
    } else if ((role == Role::outer && broken) || !pump(connection)) {
      close(found);
    }
  }
  // After those that are here have had their turn: who has just got through needn't give way.
  if (someone_knocks) {
    accept_some();
  }
}

// --- Requests ----------------------------------------------------------------------------------------

KVFERRY_INLINE HandshakeGate::Table::iterator HandshakeGate::find(std::string_view name) {
  std::uint64_t number = 0;
  std::from_chars(name.data(), name.data() + name.size(), number);
  return connections_.find(number);
}

KVFERRY_INLINE std::string HandshakeGate::request_taken(std::string_view name, std::size_t frames, std::size_t bytes) {
  // The bytes that ZMTP, and a mechanism that encrypts, add to a frame.
  constexpr std::size_t around_a_frame = 64;
  const auto found = find(name);
  if (found == connections_.end()) {
    return {};
  }
  Connection& connection = found->second;
  release(connection, bytes + std::min<std::size_t>(frames, 8) * around_a_frame);
  ++connection.requests;
  connection.has_asked = true;
  connection.since = Clock::now();
  sweep_by(deadline(connection));
  watch(connection);
  if (!starved_.empty()) {
    feed_starved();
  }
  return connection.source->first;
}

KVFERRY_INLINE bool HandshakeGate::request_answered(std::string_view name, std::size_t bytes) {
  const auto found = find(name);
  if (found == connections_.end()) {
    return false;
  }
  Connection& connection = found->second;
  Source& source = connection.source->second;
  const auto exceeds = [bytes](std::size_t used, std::size_t bound) { return used + bytes > bound; };
  for (bool fits = false; !fits;) {
    const auto victim = exceeds(connection.unread, bounds_.unread_bytes)      ? found
                        : exceeds(source.unread, bounds_.source_unread_bytes) ? most_unread(&source)
                        : exceeds(unread_, bounds_.total_unread_bytes)        ? most_unread(nullptr)
                                                                              : connections_.end();
    fits = victim == connections_.end();
    if (!fits) {
      refused(errc::resource_limit, victim->second.source->first,
              "a connection to the handshake's port doesn't take its answers");
      const bool is_this = victim == found;
      close(victim);
      if (is_this) {
        return false;
      }
    }
  }
  connection.unread += bytes;
  source.unread += bytes;
  unread_ += bytes;
  connection.requests -= connection.requests > 0 ? 1 : 0;
  connection.since = Clock::now();
  sweep_by(deadline(connection));
  return true;
}

KVFERRY_INLINE HandshakeGate::Table::iterator HandshakeGate::most_unread(const Source* source) {
  auto most = connections_.end();
  for (auto it = connections_.begin(); it != connections_.end(); ++it) {
    const bool counts = source == nullptr || &it->second.source->second == source;
    if (counts && (most == connections_.end() || it->second.unread > most->second.unread)) {
      most = it;
    }
  }
  return most;
}

// --- Who has to go -----------------------------------------------------------------------------------

/// Whether it is the peer's turn to do something. A few bytes are no request that has begun: ZMTP's heartbeats.
KVFERRY_INLINE bool HandshakeGate::owes(const Connection& connection) const {
  return !connection.has_asked || connection.bytes > bounds_.free_bytes || !connection.to_outer.empty();
}

KVFERRY_INLINE HandshakeGate::Clock::time_point HandshakeGate::deadline(const Connection& connection) const {
  if (owes(connection)) {
    return connection.since + bounds_.patience;
  }
  return connection.requests > 0 ? Clock::time_point::max() : connection.since + bounds_.idle;
}

KVFERRY_INLINE void HandshakeGate::sweep_by(Clock::time_point when) {
  if (when != Clock::time_point::max() && (!next_sweep_ || when < *next_sweep_)) {
    next_sweep_ = when;
  }
}

KVFERRY_INLINE void HandshakeGate::expire(Clock::time_point now) {
  if (!next_sweep_ || now < *next_sweep_) {
    return;
  }
  next_sweep_.reset();
  for (auto it = connections_.begin(); it != connections_.end();) {
    const auto connection = it++;
    if (const auto until = deadline(connection->second); until <= now) {
      if (owes(connection->second)) {
        refused(
            errc::timed_out, connection->second.source->first,
            connection->second.phase == Phase::silent
                ? "a connection to the handshake's port said nothing"
                : "a connection to the handshake's port didn't end its request, or didn't take the answer, in time");
      }
      close(connection);
    } else {
      sweep_by(std::max(until, now + full_pause));
    }
  }
  if (!accepting_) {
    pause_accepting(false);
  }
}

KVFERRY_INLINE void HandshakeGate::refused(std::error_code cause, const std::string& source,
                                           std::string_view why) const {
  if (refusals_) {
    refusals_->count(cause, source, why);
  }
}

KVFERRY_INLINE void HandshakeGate::retire() {
  for (const auto& endpoint : std::exchange(retired_, {})) {
    ::zmq_disconnect(router_.handle(), endpoint.c_str());
  }
}

KVFERRY_INLINE void HandshakeGate::close(Table::iterator at) {
  Connection& connection = at->second;
  release(connection, connection.bytes);
  has_left(connection, connection.unread);
  if (!connection.endpoint.empty()) {
    retired_.push_back(std::move(connection.endpoint));
  }
  starved_.erase(connection.number);
  was_greeted(connection);
  const SourceEntry source = connection.source;
  connections_.erase(at);
  if (--source->second.connections == 0) {
    sources_.erase(source);
  }
  if (!starved_.empty()) {
    feed_starved();
  }
}

}  // namespace kvferry::kit
