// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// A port to which a connection is never made and never refused, as at the address of a host that is gone: its queue of
/// connections is full, so the kernel drops what asks for another.
class UnansweringPort {
 public:
  /// @param address an IPv4 address of this host.
  /// @param port 0 for any.
  explicit UnansweringPort(const std::string& address, std::uint16_t port = 0) {
    at_.sin_family = AF_INET;
    at_.sin_port = htons(port);
    socklen_t size = sizeof(at_);
    const int listener = open();
    const int yes = 1;
    if (::inet_pton(AF_INET, address.c_str(), &at_.sin_addr) != 1 ||
        ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) != 0 || ::bind(listener, name(), size) != 0 ||
        ::listen(listener, 0) != 0 || ::getsockname(listener, name(), &size) != 0) {
      throw std::runtime_error("cannot listen at " + address);
    }
    constexpr std::size_t more_than_fit = 4;
    for (std::size_t i = 0; i < more_than_fit; ++i) {
      (void)::connect(open(), name(), size);
    }
    // The kernel may get to them a little later, and has room until then.
    pollfd full{listener, POLLIN, 0};
    if (::poll(&full, 1, 30'000) != 1) {
      throw std::runtime_error("nobody comes to " + address);
    }
  }
  UnansweringPort(const UnansweringPort&) = delete;
  UnansweringPort& operator=(const UnansweringPort&) = delete;
  ~UnansweringPort() {
    for (const int descriptor : descriptors_) {
      ::close(descriptor);
    }
  }

  [[nodiscard]] std::uint16_t port() const { return ntohs(at_.sin_port); }

  /// Those that asked before get no connection by that, but must ask again.
  void make_room() {
    for (std::size_t i = descriptors_.size(); i-- > 1;) {
      ::close(descriptors_[i]);
    }
    descriptors_.resize(1);
    take_all();
  }
  /// @return how many connections there were.
  std::size_t take_all() {
    std::size_t count = 0;
    for (int taken = 0; (taken = ::accept4(descriptors_.front(), nullptr, nullptr, SOCK_CLOEXEC)) != -1; ++count) {
      ::close(taken);
    }
    return count;
  }

 private:
  [[nodiscard]] sockaddr* name() { return reinterpret_cast<sockaddr*>(&at_); }
  int open() {
    const int descriptor = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (descriptor == -1) {
      throw std::runtime_error("no socket");
    }
    descriptors_.push_back(descriptor);
    return descriptor;
  }

  sockaddr_in at_{};
  std::vector<int> descriptors_;
};

}  // namespace kvferry::test
