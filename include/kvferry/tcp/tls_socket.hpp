// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include <kvferry/tcp/socket.hpp>
#include <kvferry/tcp/tls_stream.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// A socket whose bytes are encrypted. Threads that wait for its events use only the descriptor.
class TlsSocket final : public Socket {
 public:
  TlsSocket(int descriptor, std::unique_ptr<TlsStream> tls) : Socket(descriptor), tls_(std::move(tls)) {}

  [[nodiscard]] ssize_t send(std::span<iovec> pieces) override { return tls_->send(pieces); }
  [[nodiscard]] ssize_t receive(std::span<iovec> pieces) override {
    const std::uint64_t enough = tls_->records() + most_records_at_once;
    ssize_t received = 0;
    stopped_ = false;
    for (const iovec& piece : pieces) {
      const ssize_t part = tls_->receive({static_cast<std::byte*>(piece.iov_base), piece.iov_len});
      if (part < 0 && received == 0) {
        return part;
      }
      received += std::max<ssize_t>(part, 0);
      stopped_ = tls_->records() >= enough;
      if (part != static_cast<ssize_t>(piece.iov_len) || stopped_) {
        break;
      }
    }
    return received;
  }
  [[nodiscard]] bool by_cpu() const noexcept override { return true; }
  [[nodiscard]] bool holds_back() const noexcept override { return tls_->holds_back(); }
  [[nodiscard]] ssize_t flush() override { return tls_->flush(); }
  [[nodiscard]] bool over() const noexcept override { return stopped_ || tls_->has_more(); }
  [[nodiscard]] std::uint64_t records() const noexcept override { return tls_->records(); }
  void say_end() override { tls_->end(); }

  [[nodiscard]] ssize_t discard(std::size_t bytes) override {
    std::array<std::byte, std::size_t{16} << 10> thrown_away;
    const std::uint64_t enough = tls_->records() + most_records_at_once;
    std::size_t left = bytes;
    stopped_ = false;
    while (left != 0) {
      const std::size_t wanted = std::min(left, thrown_away.size());
      const ssize_t part = tls_->receive(std::span(thrown_away).first(wanted));
      if (part < 0 && left == bytes) {
        return part;
      }
      left -= static_cast<std::size_t>(std::max<ssize_t>(part, 0));
      stopped_ = tls_->records() >= enough;
      if (part != static_cast<ssize_t>(wanted) || stopped_) {
        break;
      }
    }
    return static_cast<ssize_t>(bytes - left);
  }

 private:
  const std::unique_ptr<TlsStream> tls_;
  bool stopped_ = false;  ///< Before there was nothing more to take.
};

}  // namespace kvferry::tcp
