// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_sockets.hpp>

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>

#include <kvferry/error.hpp>

#include <kvferry/detail/event_descriptor.hpp>
#include <kvferry/detail/process.hpp>
#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

struct ProcessContext {
  std::mutex mutex;
  std::weak_ptr<zmq::context_t> shared;
  std::mutex beginnings_and_ends;
};

/// Also for channels that are made or destroyed after main. A context is of no use to a forked child.
KVFERRY_INLINE constinit PerProcess<ProcessContext> of_process;

/// Tries a call that each thread of libzmq makes. If a filter of system calls forbids it (systemd's "@resources"), libzmq would
/// abort the process.
/// @return an errno, or 0.
KVFERRY_INLINE int set_own_scheduling() noexcept {
  int policy = 0;
  sched_param parameters{};
  const int unknown = ::pthread_getschedparam(::pthread_self(), &policy, &parameters);
  return unknown != 0 ? unknown : ::pthread_setschedparam(::pthread_self(), policy, &parameters);
}

/// libzmq aborts the process where it gets no thread or descriptor while a context starts. So as many are taken first, and
/// given back: an event and an epoll for each of its two threads, and an event for a socket.
/// @throws std::system_error
KVFERRY_INLINE void require_what_starting_takes() {
  const std::array<EventDescriptor, 5> descriptors;
  std::promise<void> enough;
  const std::shared_future<void> until = enough.get_future().share();
  std::vector<std::thread> threads;
  std::atomic<int> refused{0};
  const auto join = [&] {
    enough.set_value();
    for (auto& thread : threads) {
      thread.join();
    }
  };
  try {
    for (int i = 0; i < 2; ++i) {
      threads.push_back(start_thread("kvferry-probe", [until, &refused] {
        if (const int error = set_own_scheduling(); error != 0) {
          refused = error;
        }
        until.wait();
      }));
    }
  } catch (...) {
    join();
    throw;
  }
  join();
  if (refused != 0) {
    throw TransferError(
        {refused, std::system_category()},
        "ZeroMQ's threads: they may not set their scheduling (sched_setscheduler), without which it does not start");
  }
}

/// Has the context start its threads now, where an error can be told.
KVFERRY_INLINE void start_context(void* context) {
  require_what_starting_takes();
  const SignalsBlocked blocked;
  void* const socket = zmq_socket(context, ZMQ_PAIR);
  if (socket == nullptr) {
    throw zmq::error_t();
  }
  zmq_close(socket);
}

/// One at a time, as contexts begin: what ZeroMQ stands on (OpenPGM) has no lock between the last user that goes and the
/// first that comes.
struct EndContext {
  void operator()(zmq::context_t* context) const noexcept {
    const std::lock_guard lock(of_process.here().beginnings_and_ends);
    std::default_delete<zmq::context_t>()(context);
  }
};

KVFERRY_INLINE std::shared_ptr<zmq::context_t> new_context() {
  // ZeroMQ ends the process where a filter of system calls keeps it from having one.
  { const EventDescriptor allowed; }
  std::unique_ptr<zmq::context_t, EndContext> made;
  {
    const std::lock_guard lock(of_process.here().beginnings_and_ends);
    made.reset(std::make_unique<zmq::context_t>().release());
  }
  std::shared_ptr<zmq::context_t> context(std::move(made));
  // Three for each question that is on its way; the default is 1023.
  context->set(zmq::ctxopt::max_sockets, 8192);
  start_context(context->handle());
  return context;
}

KVFERRY_INLINE std::shared_ptr<zmq::context_t> process_context() {
  ProcessContext& process = of_process.here();
  const std::lock_guard lock(process.mutex);
  auto context = process.shared.lock();
  if (!context) {
    context = new_context();
    process.shared = context;
  }
  return context;
}

/// ZeroMQ's calls end with EINTR before they have done anything, and cppzmq throws that.
template <class Operation>
auto uninterrupted(Operation operation) {
  while (true) {
    try {
      return operation();
    } catch (const zmq::error_t& error) {
      if (error.num() != EINTR) {
        throw;
      }
    }
  }
}

}  // namespace internal

KVFERRY_INLINE std::size_t largest_frame(std::size_t max_message_bytes) noexcept {
  return max_message_bytes > std::numeric_limits<std::size_t>::max() / 2 ? max_message_bytes : 2 * max_message_bytes;
}

KVFERRY_INLINE SharedContext::SharedContext(void* user)
    : user_(user), own_(user == nullptr ? process_context() : nullptr) {
  if (user_ != nullptr) {
    start_context(user_);
  }
}

KVFERRY_INLINE SharedContext SharedContext::of_its_own() { return SharedContext(new_context()); }

KVFERRY_INLINE HandshakeSocket::HandshakeSocket(const SharedContext& context, zmq::socket_type type,
                                                std::size_t max_message_bytes)
    : handle_(zmq_socket(context.handle(), static_cast<int>(type))) {
  if (handle_ == nullptr) {
    throw zmq::error_t();
  }
  constexpr std::size_t no_limit = std::numeric_limits<std::int64_t>::max();
  ref().set(zmq::sockopt::linger, 0);
  ref().set(zmq::sockopt::maxmsgsize, static_cast<std::int64_t>(std::min(max_message_bytes, no_limit)));
  ref().set(zmq::sockopt::tcp_keepalive, 1);
}

KVFERRY_INLINE void HandshakeSocket::connect(const HostPort& address) const {
  ref().set(zmq::sockopt::ipv6, address.is_ipv6_literal());
  uninterrupted([&] { ref().connect(address.to_url()); });
}

KVFERRY_INLINE std::vector<zmq::message_t> HandshakeSocket::receive(std::size_t* bytes) const {
  std::vector<zmq::message_t> frames;
  bool more = true;
  while (more) {
    zmq::message_t frame;
    if (!uninterrupted([&] { return ref().recv(frame, zmq::recv_flags::dontwait); })) {
      break;
    }
    more = frame.more();
    if (bytes != nullptr && !frames.empty()) {
      *bytes += frame.size();
    }
    if (frames.size() <= max_frames) {
      frames.push_back(std::move(frame));
    }
  }
  return frames;
}

KVFERRY_INLINE bool HandshakeSocket::send(std::span<const Bytes> envelope, const Bytes& payload) const {
  const auto send_frame = [this](const Bytes& frame, zmq::send_flags flags) {
    return uninterrupted([&] {
      return ref().send(zmq::buffer(frame.data(), frame.size()), flags | zmq::send_flags::dontwait).has_value();
    });
  };
  return std::ranges::all_of(envelope,
                             [&](const Bytes& frame) { return send_frame(frame, zmq::send_flags::sndmore); }) &&
         send_frame(payload, zmq::send_flags::none);
}

KVFERRY_INLINE HandshakeMonitor::HandshakeMonitor(const SharedContext& context, const HandshakeSocket& watched,
                                                  int events)
    : pair_(context, zmq::socket_type::pair, 0) {
  static std::atomic<std::uint64_t> count = 0;
  const auto endpoint = "inproc://kvferry-monitor-" + std::to_string(count++);
  // No limit, lest ZeroMQ's thread wait for room.
  ref().set(zmq::sockopt::rcvhwm, 0);
  uninterrupted([&] {
    if (zmq_socket_monitor(watched.ref().handle(), endpoint.c_str(), events) != 0) {
      throw zmq::error_t();
    }
  });
  watched_.reset(watched.ref().handle());
  uninterrupted([&] { ref().connect(endpoint); });
}

KVFERRY_INLINE std::optional<int> HandshakeMonitor::receive(std::chrono::milliseconds timeout,
                                                            std::uint32_t* value) const {
  ref().set(zmq::sockopt::rcvtimeo, static_cast<int>(timeout.count()));
  zmq::message_t event;
  zmq::message_t address;
  std::uint16_t number = 0;
  const auto receive_into = [this](zmq::message_t& frame) {
    return uninterrupted([&] { return ref().recv(frame).has_value(); });
  };
  if (!receive_into(event) || !receive_into(address) || event.size() < sizeof(number)) {
    return std::nullopt;
  }
  std::memcpy(&number, event.data(), sizeof(number));
  if (value != nullptr && event.size() == sizeof(number) + sizeof(*value)) {
    std::memcpy(value, event.data<std::byte>() + sizeof(number), sizeof(*value));
  }
  return number;
}

KVFERRY_INLINE std::error_code error_code_of(const zmq::error_t& error) noexcept {
  if (error.num() == ETERM) {
    return errc::closed;
  }
  if (error.num() == EMTHREAD) {
    return std::make_error_code(std::errc::invalid_argument);  // a context without I/O threads
  }
  return {error.num(), std::system_category()};
}

}  // namespace kvferry::kit
