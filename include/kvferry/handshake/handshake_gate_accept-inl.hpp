// SPDX-License-Identifier: Apache-2.0
#pragma once

// Accepts connections, makes room for them, and hands a stranger's connection to ZeroMQ.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/listening_socket.hpp>
#include <kvferry/detail/source_address.hpp>
#include <kvferry/detail/standard_descriptors.hpp>
#include <kvferry/handshake/handshake_gate-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// In one turn, so that a flood leaves time for all else that the thread does: those that are taken in, and those that are
/// looked at. The latter are cheap, and have to go faster than anybody can connect and hang up, or the listen queue fills.
inline constexpr std::uint64_t accepts_a_turn = 16;
inline constexpr int knocks_a_turn = 128;
/// Those that ZeroMQ has got and not greeted yet.
inline constexpr std::size_t most_ungreeted = 32;
/// The time that a connection has while the thread is busy, before it gives way to a newer one.
inline constexpr std::chrono::milliseconds silent_grace{20};
inline constexpr std::chrono::milliseconds open_grace{50};
inline constexpr std::chrono::milliseconds answer_grace{1'000};
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

}  // namespace internal

KVFERRY_INLINE void HandshakeGate::accept_some() {
  const std::uint64_t before = last_number_;
  const auto is_enough = [&] {
    const std::uint64_t taken = last_number_ - before;
    return taken == accepts_a_turn || (taken > 0 && ungreeted_ >= most_ungreeted);
  };
  for (int i = 0; i < knocks_a_turn && !is_enough() && accept_one(); ++i) {
  }
  // Who is in ZeroMQ needs several turns, and in each waits for all others. In the listen queue he waits once, and if he
  // gives up there, he costs ZeroMQ nothing: while accepting is paused, each sweep takes those out who have hung up.
  if (last_number_ > before && ungreeted_ >= most_ungreeted) {
    pause_accepting(true);
  }
}

KVFERRY_INLINE void HandshakeGate::was_greeted(Connection& connection) {
  if (std::exchange(connection.ungreeted, false) && --ungreeted_ <= most_ungreeted / 2 && !accepting_) {
    pause_accepting(false);
  }
}

/// Who has sent his last byte can't go on with ZMTP's handshake.
KVFERRY_INLINE bool HandshakeGate::has_hung_up(const Descriptor& outer) {
  pollfd end{outer.get(), POLLRDHUP, 0};
  return ::poll(&end, 1, 0) > 0;
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
    if (!has_hung_up(outer)) {
      admit(std::move(outer), source_of(reinterpret_cast<const sockaddr&>(from)));
    }
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
    ++last_number_;  // it took as long as one that is taken in
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
  connection.ungreeted = true;
  ++ungreeted_;
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

/// To who has heard nothing yet. With keys, he would take a mere end for what is said to a wrong one.
KVFERRY_INLINE void HandshakeGate::say_no_room(const Descriptor& outer) const {
  if (bounds_.greets_first && outer) {
    static const std::string said = not_now();
    (void)::send(outer.get(), said.data(), said.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  }
}

}  // namespace kvferry::kit
