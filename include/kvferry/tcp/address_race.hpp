// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Connects to the first of several addresses that accepts a connection (RFC 8305, "Happy Eyeballs"). Each is tried a
/// quarter of a second after the one before it, or as soon as that one has failed; earlier ones may still answer
/// meanwhile. So a silent address costs a quarter of a second, not the whole timeout.
class AddressRace : public std::enable_shared_from_this<AddressRace> {
 public:
  using Endpoint = asio::ip::tcp::endpoint;
  /// Gets the connected socket, or the error of the last attempt that failed.
  using Handler = std::function<void(std::error_code, asio::ip::tcp::socket)>;

  static constexpr std::chrono::milliseconds attempt_delay{250};  ///< RFC 8305, section 5.

  /// @param candidates in the order in which to try them; at least one.
  /// @param on_end runs on the executor.
  AddressRace(const asio::any_io_executor& executor, std::vector<Endpoint> candidates, Handler on_end);

  void start();
  /// Gives up. `on_end` is not called any more, unless a call is under way.
  void stop();

 private:
  using Attempt = std::shared_ptr<asio::ip::tcp::socket>;

  void try_next();
  void wait();
  void connected(const Attempt& attempt);
  void failed(const Attempt& attempt, std::error_code cause);

  const asio::any_io_executor executor_;
  const std::vector<Endpoint> candidates_;
  std::mutex mutex_;  ///< Guards all below, the state of the sockets included.
  Handler on_end_;
  asio::steady_timer timer_;
  std::size_t tried_ = 0;
  std::list<Attempt> attempts_;
};

}  // namespace kvferry::tcp
