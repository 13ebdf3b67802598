// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>

#include <kvferry/testing/own_loopback.hpp>

namespace kvferry_test {

/// A port of this process's loopback address for what ends and comes back at the same one. It is below those that the system gives to
/// whoever asks for any, so that in between no other channel of the test takes it.
inline std::uint16_t lasting_port() {
  unsigned first_of_any = 32768;
  std::ifstream("/proc/sys/net/ipv4/ip_local_port_range") >> first_of_any;
  std::random_device random;
  std::uniform_int_distribution<unsigned> any(10'000, first_of_any > 10'100 ? first_of_any - 1 : 32'767);
  for (int tries = 0; tries < 1000; ++tries) {
    const auto port = static_cast<std::uint16_t>(any(random));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    ::inet_pton(AF_INET, kvferry::testing::own_loopback().c_str(), &address.sin_addr);
    address.sin_port = htons(port);
    const int probe = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const bool free = ::bind(probe, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
    ::close(probe);
    if (free) {
      return port;
    }
  }
  throw std::runtime_error("no port of the loopback is free");
}

inline std::string lasting_url() { return "tcp://" + kvferry::testing::own_loopback() + ":" + std::to_string(lasting_port()); }

}  // namespace kvferry_test
