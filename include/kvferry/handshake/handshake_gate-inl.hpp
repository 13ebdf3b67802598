// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_gate.hpp>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <limits>
#include <random>
#include <system_error>
#include <tuple>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/descriptor_limit.hpp>
#include <kvferry/detail/listening_socket.hpp>
#include <kvferry/detail/source_address.hpp>
#include <kvferry/detail/standard_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// The bounds of one turn, so that a flood leaves time for all else that the thread does.
inline constexpr int events_a_turn = 64;
inline constexpr int accepts_a_turn = 16;
inline constexpr std::size_t bytes_a_turn = std::size_t{64} * 1024;
/// The time that a connection has while the thread is busy, before it gives way to a newer one.
inline constexpr std::chrono::milliseconds silent_grace{20};
inline constexpr std::chrono::milliseconds open_grace{50};
inline constexpr std::chrono::milliseconds answer_grace{1'000};
inline constexpr std::chrono::milliseconds full_pause{10};
inline constexpr std::chrono::milliseconds never = std::chrono::hours(24);
/// ZMTP begins with ten bytes that each side sends unasked.
inline constexpr std::size_t signature_bytes = 10;

/// "Not now", in ZMTP 3.1: a greeting, and the ERROR of a server that can't look at a key at the moment (ZAP's status 300,
/// https://rfc.zeromq.org/spec/27).
KVFERRY_INLINE std::string not_now() {
  constexpr std::size_t greeting_bytes = 64;
  std::string said("\xFF\0\0\0\0\0\0\0\1\x7F\3\1CURVE", 17);
  said.resize(greeting_bytes);
  said[32] = 1;  // as a server
  return said + std::string("\4\n\5ERROR\003300", 12);
}

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
  // What is larger may take longer to come.
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
  // What is unread is counted here. ZeroMQ's own bound would drop answers without a word, and they would count for ever.
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

// --- Who comes in ----------------------------------------------------------------------------------

KVFERRY_INLINE void HandshakeGate::accept_some() {
  for (int i = 0; i < accepts_a_turn && accept_one(); ++i) {
  }
}

KVFERRY_INLINE bool HandshakeGate::accept_one() {
  if (connections_.size() >= bounds_.connections && !make_room({})) {
    pause_accepting(true);
    return false;
  }
  occupy_standard_descriptors();
  sockaddr_storage from{};
  socklen_t size = sizeof(from);
  Descriptor outer(::accept4(listener_.get(), reinterpret_cast<sockaddr*>(&from), &size, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (outer) {
    admit(std::move(outer), source_of(reinterpret_cast<const sockaddr&>(from)));
    return true;
  }
  if (errno == ECONNABORTED || errno == EINTR) {
    return true;
  }
  if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM) {
    return false;
  }
  if (make_room({})) {
    return true;
  }
  if (!connections_.empty()) {
    pause_accepting(true);  // until one of those that are in the middle of something is done, or has had its time
    return false;
  }
  // Nobody here to give way: whoever knocks is told so, rather than left to wait while this thread spins.
  refused({errno, std::system_category()}, {}, "no descriptor for a connection to the handshake's port");
  spare_.reset();
  Descriptor turned_away(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  say_no_room(turned_away);
  turned_away.reset();
  spare_ = open_spare();
  pause_accepting(true);
  return false;
}

KVFERRY_INLINE void HandshakeGate::admit(Descriptor descriptor, std::string source) {
  const auto known = sources_.find(source);
  if (known != sources_.end() && known->second.connections >= std::max<std::size_t>(bounds_.connections * 3 / 4, 1) &&
      !make_room(source)) {
    refused(errc::resource_limit, source,
            "this address has all the connections to the handshake's port that one may have");
    say_no_room(descriptor);
    return;
  }
  set_option(descriptor.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(descriptor.get(), SOL_SOCKET, SO_KEEPALIVE, 1);
  Connection& connection = connections_[++last_number_];
  connection.number = last_number_;
  connection.outer = std::move(descriptor);
  connection.source = sources_.try_emplace(std::move(source)).first;
  ++connection.source->second.connections;
  connection.since = Clock::now();
  sweep_by(deadline(connection));
  epoll_event event{0, {.u64 = tag_of(connection.number, Role::outer)}};
  if (::epoll_ctl(events_.get(), EPOLL_CTL_ADD, connection.outer.get(), &event) != 0) {
    close(connections_.find(connection.number));
    return;
  }
  read_signature(connection);  // it has most often come with the connection
}

/// @param source whose connections are meant; empty: those of the source that has most.
/// @return whether one was closed.
KVFERRY_INLINE bool HandshakeGate::make_room(const std::string& source) {
  const auto most = source.empty()
                        ? std::ranges::max_element(sources_, {}, [](const auto& one) { return one.second.connections; })
                        : sources_.find(source);
  if (most == sources_.end()) {
    return false;
  }
  const auto now = Clock::now();
  const auto worth = [](const Connection& one) {
    return std::tuple(awaits_answer(one), one.phase == Phase::open, one.since);
  };
  auto victim = connections_.end();
  for (auto it = connections_.begin(); it != connections_.end(); ++it) {
    if (it->second.source == most && may_give_way(it->second, now) &&
        (victim == connections_.end() || worth(it->second) < worth(victim->second))) {
      victim = it;
    }
  }
  if (victim == connections_.end()) {
    return false;
  }
  if (!victim->second.has_asked || awaits_answer(victim->second)) {
    refused(errc::resource_limit, most->first, "a connection to the handshake's port had to make room for a newer one");
    if (victim->second.phase != Phase::open) {
      say_no_room(victim->second.outer);
    }
  }
  close(victim);
  return true;
}

/// Also one that was answered, as long as the answer is on its way.
KVFERRY_INLINE bool HandshakeGate::awaits_answer(const Connection& connection) {
  return connection.requests > 0 || connection.unread > 0 || !connection.to_outer.empty();
}

KVFERRY_INLINE bool HandshakeGate::may_give_way(const Connection& connection, Clock::time_point now) const {
  const auto grace = awaits_answer(connection)           ? answer_grace
                     : connection.phase == Phase::silent ? silent_grace
                     : connection.has_asked              ? std::chrono::milliseconds(0)
                                                         : open_grace;
  return now - connection.since >= grace;
}

KVFERRY_INLINE void HandshakeGate::pause_accepting(bool pause) {
  epoll_event event{pause ? 0U : EPOLLIN, {.u64 = listener_tag}};
  ::epoll_ctl(events_.get(), EPOLL_CTL_MOD, listener_.get(), &event);
  accepting_ = !pause;
  if (pause) {
    sweep_by(Clock::now() + full_pause);
  }
}

// --- From strangers to connections of ZeroMQ's -------------------------------------------------------

KVFERRY_INLINE void HandshakeGate::read_signature(Connection& connection) {
  std::array<char, signature_bytes> bytes;
  const ssize_t received =
      ::recv(connection.outer.get(), bytes.data(), bytes.size() - connection.to_inner.size(), MSG_DONTWAIT);
  if (received > 0) {
    connection.to_inner.insert(connection.to_inner.end(), bytes.data(), bytes.data() + received);
  }
  const auto& read = connection.to_inner;
  const bool senseless =
      (!read.empty() && read.front() != '\xFF') || (read.size() == signature_bytes && read.back() != '\x7F');
  if (senseless) {
    refused(errc::protocol_violation, connection.source->first,
            "what came to the handshake's port is no ZeroMQ greeting");
  }
  if (received == 0 || (received < 0 && !would_block()) || senseless) {
    close(connections_.find(connection.number));
  } else if (read.size() == signature_bytes) {
    join(connection);
  } else {
    watch_outer(connection, EPOLLIN);
  }
}

KVFERRY_INLINE std::string HandshakeGate::rendezvous_name(std::uint64_t number) const {
  return name_ + std::to_string(number);
}

KVFERRY_INLINE Descriptor HandshakeGate::open_rendezvous(std::uint64_t number) const {
  Descriptor rendezvous(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  // No name that the kernel makes up: it would be another one's as soon as the rendezvous is closed, while ZeroMQ still
  // knows the connection by it.
  const std::string name = rendezvous_name(number);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::ranges::copy(name, &address.sun_path[1]);
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (rendezvous && (::bind(rendezvous.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
                     ::listen(rendezvous.get(), 1) != 0)) {
    const int error = errno;
    rendezvous.reset();
    errno = error;
  }
  return rendezvous;
}

KVFERRY_INLINE void HandshakeGate::join(Connection& connection) {
  connection.phase = Phase::joining;
  watch(connection);
  connection.rendezvous = open_rendezvous(connection.number);
  epoll_event event{EPOLLIN, {.u64 = tag_of(connection.number, Role::rendezvous)}};
  if (!connection.rendezvous || ::epoll_ctl(events_.get(), EPOLL_CTL_ADD, connection.rendezvous.get(), &event) != 0) {
    refused({errno, std::system_category()}, connection.source->first,
            "no socket for a connection to the handshake's port");
    say_no_room(connection.outer);
    close(connections_.find(connection.number));
    return;
  }
  connection.endpoint = "ipc://@" + rendezvous_name(connection.number);
  try {
    router_.set(zmq::sockopt::connect_routing_id, std::to_string(connection.number));
    router_.connect(connection.endpoint);
  } catch (const zmq::error_t& error) {
    if (error.num() == ETERM) {
      throw;
    }
    refused({error.num(), std::system_category()}, connection.source->first,
            "ZeroMQ takes no connection to the handshake's port");
    say_no_room(connection.outer);
    close(connections_.find(connection.number));
  }
}

KVFERRY_INLINE void HandshakeGate::joined(Connection& connection) {
  Descriptor inner(::accept4(connection.rendezvous.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!inner) {
    if (!would_block() && errno != ECONNABORTED && errno != EINTR) {
      // It would stay readable, and this thread would go round.
      refused({errno, std::system_category()}, connection.source->first,
              "no descriptor for a connection to the handshake's port");
      say_no_room(connection.outer);
      close(connections_.find(connection.number));
    }
    return;
  }
  ucred other{};
  socklen_t size = sizeof(other);
  if (::getsockopt(inner.get(), SOL_SOCKET, SO_PEERCRED, &other, &size) != 0 || other.pid != process_) {
    return;  // not ZeroMQ; that is still to come, or the deadline
  }
  connection.rendezvous.reset();
  connection.inner = std::move(inner);
  connection.phase = Phase::open;
  if (!pump(connection)) {
    close(connections_.find(connection.number));
  }
}

// --- Requests ----------------------------------------------------------------------------------------

KVFERRY_INLINE HandshakeGate::Table::iterator HandshakeGate::find(std::string_view name) {
  std::uint64_t number = 0;
  std::from_chars(name.data(), name.data() + name.size(), number);
  return connections_.find(number);
}

KVFERRY_INLINE std::string HandshakeGate::request_taken(std::string_view name, std::size_t frames, std::size_t bytes) {
  // What ZMTP, and a mechanism that encrypts, add to a frame.
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

/// To who has heard nothing yet. With keys, he would take a mere end for what is said to a wrong one.
KVFERRY_INLINE void HandshakeGate::say_no_room(const Descriptor& outer) const {
  if (bounds_.greets_first && outer) {
    static const std::string said = not_now();
    (void)::send(outer.get(), said.data(), said.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
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
