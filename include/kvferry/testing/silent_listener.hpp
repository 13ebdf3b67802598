// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// An address that accepts connections (the kernel does) and never says anything: a peer that hangs.
class SilentListener {
 public:
  SilentListener() : acceptor_(context_, {asio::ip::address_v4::loopback(), 0}) {}

  [[nodiscard]] std::string url() const {
    return "tcp://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port());
  }

 private:
  asio::io_context context_;
  asio::ip::tcp::acceptor acceptor_;
};

/// An address without a listener. It stays reserved, so no other process can listen there.
class DeafAddress {
 public:
  DeafAddress() : socket_(context_, {asio::ip::address_v4::loopback(), 0}) {}

  [[nodiscard]] std::string url() const {
    return "tcp://127.0.0.1:" + std::to_string(socket_.local_endpoint().port());
  }

 private:
  asio::io_context context_;
  asio::ip::tcp::socket socket_;
};

}  // namespace kvferry::testing
