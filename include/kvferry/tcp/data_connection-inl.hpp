// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/data_connection.hpp>

#include <asio/buffer.hpp>

#include <array>
#include <cerrno>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE std::size_t DataConnection::read_some(std::span<std::byte> to, std::error_code& ec) {
  if (!tls) {
    return socket.read_some(asio::buffer(to.data(), to.size()), ec);
  }
  ec.clear();
  if (tls->holds_back() && tls->flush() != 0) {
    ec = {errno, asio::error::get_system_category()};
    return 0;
  }
  const ssize_t received = tls->receive(to);
  if (received > 0) {
    return static_cast<std::size_t>(received);
  }
  if (received == 0 || errno == EPROTO) {
    ec = asio::error::eof;
  } else if (errno == EBADMSG) {
    ec = errc::authentication_failed;
  } else {
    ec = {errno, asio::error::get_system_category()};
  }
  return 0;
}

KVFERRY_INLINE void DataConnection::write(std::span<const std::byte> bytes, std::error_code& ec) {
  ec.clear();
  if (!tls) {
    if (socket.write_some(asio::buffer(bytes.data(), bytes.size()), ec) != bytes.size() && !ec) {
      ec = asio::error::would_block;
    }
    return;
  }
  // The bytes are only read.
  const std::array pieces{iovec{const_cast<std::byte*>(bytes.data()), bytes.size()}};
  if (tls->send(pieces) < 0 || (tls->holds_back() && tls->flush() != 0 && errno != EAGAIN)) {
    ec = {errno, asio::error::get_system_category()};
  }
}

KVFERRY_INLINE void DataConnection::close() {
  std::error_code ignored;
  socket.close(ignored);
}

}  // namespace kvferry::tcp
