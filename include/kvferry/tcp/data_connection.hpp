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

  /// @param ec would_block: the socket has to become readable first; asio::error::eof; else what failed.
  [[nodiscard]] std::size_t read_some(std::span<std::byte> to, std::error_code& ec);
  /// The first bytes on a connection always fit its send buffer: if they don't, that is an error.
  void write(std::span<const std::byte> bytes, std::error_code& ec);
  void close();
};

}  // namespace kvferry::tcp
