// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <kvferry/side_message.hpp>
#include <kvferry/url.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The caller's ZeroMQ context, or a share of the process's own.
class SharedContext {
 public:
  /// @param user the caller's, which stays the caller's; null for the process's own, which lives while it is shared.
  /// @throws std::system_error or `zmq::error_t` if there are too few descriptors or threads for it.
  explicit SharedContext(void* user);
  /// A context of its own, gone with the last copy of this. @throws as above.
  [[nodiscard]] static SharedContext of_its_own();

  [[nodiscard]] void* handle() const noexcept { return user_ != nullptr ? user_ : own_->handle(); }

 private:
  explicit SharedContext(std::shared_ptr<zmq::context_t> own) : own_(std::move(own)) {}

  void* user_ = nullptr;
  std::shared_ptr<zmq::context_t> own_;
};

/// ZeroMQ hangs up on whoever sends a larger frame. Of what is too large, but not by far, an error can tell.
[[nodiscard]] std::size_t largest_frame(std::size_t max_message_bytes) noexcept;

/// A ZeroMQ socket of any context, with what all of this library's have in common: it never lingers, and limits what it
/// takes. All of it throws `zmq::error_t`.
class HandshakeSocket {
 public:
  HandshakeSocket(const SharedContext& context, zmq::socket_type type, std::size_t max_message_bytes);

  [[nodiscard]] zmq::socket_ref ref() const noexcept { return {zmq::from_handle, handle_.get()}; }

  /// ZeroMQ prefers IPv6 for everything, names included, once it may use it at all, so it is told for each address.
  void connect(const HostPort& address) const;

  /// Takes one message if there is one. Of a message with more than `max_frames` frames the rest is thrown away and
  /// `max_frames + 1` frames are returned.
  /// @param bytes if given, what is added up of all frames behind the first.
  [[nodiscard]] std::vector<zmq::message_t> receive(std::size_t* bytes = nullptr) const;
  static constexpr std::size_t max_frames = 8;

  /// Sends one message, or drops it if the peer is gone or takes nothing.
  /// @return whether it was sent.
  bool send(std::span<const Bytes> envelope, const Bytes& payload) const;

 private:
  struct Close {
    void operator()(void* socket) const noexcept { zmq_close(socket); }
  };

  std::unique_ptr<void, Close> handle_;
};

/// Tells of events (`ZMQ_EVENT_*`) of a socket, which must outlive it.
class HandshakeMonitor {
 public:
  HandshakeMonitor(const SharedContext& context, const HandshakeSocket& watched, int events);

  [[nodiscard]] zmq::socket_ref ref() const noexcept { return pair_.ref(); }

  /// The next event, if there is one or comes in time.
  /// @param value if given, what the event says more.
  [[nodiscard]] std::optional<int> receive(std::chrono::milliseconds timeout = {},
                                           std::uint32_t* value = nullptr) const;

 private:
  struct StopWatching {
    void operator()(void* socket) const noexcept { zmq_socket_monitor(socket, nullptr, 0); }
  };

  HandshakeSocket pair_;
  // Destroyed first: ZeroMQ's thread waits, with all its sockets, until somebody takes the events of a watched socket.
  std::unique_ptr<void, StopWatching> watched_;
};

/// The bytes of a frame.
[[nodiscard]] inline std::span<const std::byte> bytes_of(const zmq::message_t& frame) noexcept {
  return {static_cast<const std::byte*>(frame.data()), frame.size()};
}

/// The code of an error of ZeroMQ's: an errno, or `errc::closed` if the context was terminated.
[[nodiscard]] std::error_code error_code_of(const zmq::error_t& error) noexcept;

}  // namespace kvferry::kit
