// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/tcp.hpp>

#include <cstddef>
#include <memory>
#include <span>
#include <system_error>

#include <kvferry/tcp/tls_stream.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// A data connection before a lane has it: a socket that doesn't block, and its encryption.
struct DataConnection {
  asio::ip::tcp::socket socket;
  std::unique_ptr<TlsStream> tls = nullptr;  ///< Null: not encrypted.

  /// @param ec would_block: the socket has to be as `next_event` says first; asio::error::eof; else what failed.
  [[nodiscard]] std::size_t read_some(std::span<std::byte> to, std::error_code& ec);
  /// For a connection's first bytes, which always fit its send buffer: if they don't, that is an error. But where certificates
  /// were sent before them they may not fit: what is left then goes with the next `read_some`.
  void write(std::span<const std::byte> bytes, std::error_code& ec);
  /// The event to wait for.
  [[nodiscard]] asio::ip::tcp::socket::wait_type next_event() const noexcept {
    return tls && tls->holds_back() ? asio::ip::tcp::socket::wait_write : asio::ip::tcp::socket::wait_read;
  }
  void close();
};

}  // namespace kvferry::tcp
