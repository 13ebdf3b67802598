// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/posix/stream_descriptor.hpp>

#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <unordered_map>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Wakes the executor when a socket of the channel's can be received from or sent to: an epoll of its own within
/// Asio's.
///
/// Asio keeps a socket registered permanently, so every arrival wakes a thread, even if another one is already watching
/// the socket. Here a socket wakes a thread only if it was armed, and once.
class KVFERRY_EXPORT SocketEvents : public std::enable_shared_from_this<SocketEvents> {
 public:
  class Listener {
   public:
    virtual ~Listener() = default;
    /// Called on the executor. `broken`: the connection was reset, or has failed otherwise.
    virtual void socket_ready(bool readable, bool writable, bool broken) = 0;
  };

  /// @throws std::system_error
  explicit SocketEvents(const asio::any_io_executor& executor);

  /// Until `remove`. Nothing is reported before `arm`.
  void add(int descriptor, const std::shared_ptr<Listener>& listener, std::error_code& ec);
  /// The next event of these is reported, once: EPOLLIN, EPOLLOUT, or none of them.
  void arm(int descriptor, std::uint32_t events, std::error_code& ec) const;
  void remove(int descriptor);
  /// Reports nothing more.
  void close();

 private:
  class WaitMemory;

  void wait();
  void report();

  std::mutex mutex_;
  const std::shared_ptr<WaitMemory> wait_memory_;
  asio::posix::stream_descriptor epoll_;
  const int descriptor_;
  std::unordered_map<int, std::weak_ptr<Listener>> listeners_;
  bool waiting_ = false;
  bool closed_ = false;
};

}  // namespace kvferry::tcp
