// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <kvferry/detail/descriptor.hpp>

namespace bench {

/// Plain sockets in the place of peers: many connections, each of which moves one batch after the other and waits for an
/// answer of one byte. One thread of either process serves all connections, as the benchmark's peers share one.
class ManySockets {
 public:
  /// Forks, so no other thread may run yet.
  ManySockets(std::size_t count, std::vector<std::byte>& batch) : batch_(batch), connections_(count) {
    const kvferry::Descriptor listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const generic = reinterpret_cast<sockaddr*>(&address);
    check(::bind(listener.get(), generic, size), "bind");
    check(::listen(listener.get(), static_cast<int>(count)), "listen");
    check(::getsockname(listener.get(), generic, &size), "getsockname");
    target_ = ::fork();
    check(target_, "fork");
    if (target_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      be_target(listener.get());
    }
    for (std::size_t i = 0; i < count; ++i) {
      const int connection = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      connections_[i].socket.reset(connection);
      check(::connect(connection, generic, size), "connect");
      watch(epoll_.get(), connection, i, EPOLLIN | EPOLLOUT | EPOLLET);
    }
  }
  ManySockets(const ManySockets&) = delete;
  ManySockets& operator=(const ManySockets&) = delete;
  ~ManySockets() {
    connections_.clear();  // the other side ends then, unless a process that was forked later still has them
    ::waitpid(target_, nullptr, 0);
  }

  /// Moves batches on all connections, and returns when all have been answered. @return how many a second.
  double batches_per_second(std::chrono::milliseconds time) {
    const auto begin = std::chrono::steady_clock::now();
    std::uint64_t batches = 0;
    goes_on_ = true;
    under_way_ = connections_.size();
    for (Connection& connection : connections_) {
      batches += serve(connection);
    }
    while (under_way_ != 0) {
      std::array<epoll_event, most_events> events{};
      const int count = ::epoll_wait(epoll_.get(), events.data(), most_events, 100);
      for (const epoll_event& event : std::span(events).first(count < 0 ? 0 : static_cast<std::size_t>(count))) {
        batches += serve(connections_[event.data.u64]);
      }
      goes_on_ = goes_on_ && std::chrono::steady_clock::now() - begin < time;
    }
    return static_cast<double>(batches) /
           std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  struct Connection {
    kvferry::Descriptor socket;
    std::size_t moved = 0;  ///< Of the batch.
  };
  static constexpr int most_events = 64;

  static void check(int result, const char* what) {
    if (result < 0) {
      throw std::system_error(errno, std::system_category(), what);
    }
  }

  static void watch(int epoll, int socket, std::size_t number, std::uint32_t events) {
    // What a channel chooses within a host.
    (void)::setsockopt(socket, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
    const int yes = 1;
    check(::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)), "TCP_NODELAY");
    epoll_event event{};
    event.events = events;
    event.data.u64 = number;
    check(::epoll_ctl(epoll, EPOLL_CTL_ADD, socket, &event), "epoll_ctl");
  }

  /// Sends as much as there is room for. @return how many batches have been answered.
  std::uint64_t serve(Connection& connection) {
    std::uint64_t answered = 0;
    while (true) {
      if (connection.moved == batch_.size()) {
        std::byte answer{};
        const ssize_t got = ::recv(connection.socket.get(), &answer, 1, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN)) {
          throw std::runtime_error("the other side of plain sockets is gone");
        }
        if (got < 0) {
          return answered;
        }
        connection.moved = 0;
        ++answered;
        under_way_ -= goes_on_ ? 0U : 1U;
      }
      if (connection.moved == 0 && !goes_on_) {
        return answered;
      }
      const auto rest = std::span(batch_).subspan(connection.moved);
      const ssize_t sent = ::send(connection.socket.get(), rest.data(), rest.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent < 0) {
        if (errno != EAGAIN) {
          throw std::system_error(errno, std::system_category(), "send");
        }
        return answered;
      }
      connection.moved += static_cast<std::size_t>(sent);
    }
  }

  /// The other process: all connections' batches land in the same memory, as those of the benchmark's peers do.
  [[noreturn]] void be_target(int listener) try {
    const kvferry::Descriptor epoll(::epoll_create1(EPOLL_CLOEXEC));
    for (std::size_t i = 0; i < connections_.size(); ++i) {
      const int connection = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      check(connection, "accept");
      connections_[i].socket.reset(connection);
      watch(epoll.get(), connection, i, EPOLLIN);
    }
    while (true) {
      std::array<epoll_event, most_events> events{};
      const int count = ::epoll_wait(epoll.get(), events.data(), most_events, -1);
      for (const epoll_event& event : std::span(events).first(count < 0 ? 0 : static_cast<std::size_t>(count))) {
        Connection& connection = connections_[event.data.u64];
        const auto rest = std::span(batch_).subspan(connection.moved);
        const ssize_t got = ::recv(connection.socket.get(), rest.data(), rest.size(), MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN)) {
          ::_exit(0);
        }
        connection.moved += got < 0 ? 0U : static_cast<std::size_t>(got);
        if (connection.moved == batch_.size()) {
          connection.moved = 0;
          (void)::send(connection.socket.get(), batch_.data(), 1, MSG_NOSIGNAL);
        }
      }
    }
  } catch (const std::exception&) {
    ::_exit(1);
  }

  std::vector<std::byte>& batch_;
  const kvferry::Descriptor epoll_{::epoll_create1(EPOLL_CLOEXEC)};
  std::vector<Connection> connections_;
  bool goes_on_ = false;       ///< Whether an answered batch is followed by another one.
  std::size_t under_way_ = 0;  ///< Batches that have not been answered.
  pid_t target_ = -1;
};

}  // namespace bench
