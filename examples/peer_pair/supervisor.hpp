// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/io_context.hpp>
#include <asio/signal_set.hpp>

#include <kvferry/base_transfer_channel.hpp>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "exit_code.hpp"

namespace example {

/// Ends a channel's work early: on SIGINT or SIGTERM, and when a handler on its executor says so.
///
/// It does so by closing the channel: that wakes every blocking call, so the main thread can be written straight on.
class Supervisor {
 public:
  /// The channel must outlive the supervisor.
  explicit Supervisor(kvferry::BaseTransferChannel& channel);
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;
  /// Closes the channel and waits for the handlers on the executor.
  ~Supervisor();

  [[nodiscard]] asio::io_context::executor_type get_executor() { return io_context_.get_executor(); }

  /// Closes the channel; the first reason counts. To be called on the executor.
  void end(ExitCode code, const std::string& line);

  /// @throws Failure the reason, if the work is to end.
  void check() const;

  /// Waits for a point in time. @throws Failure the reason, as soon as the work is to end.
  void wait_until(std::chrono::steady_clock::time_point when) const;

  /// Does the work. If that fails after the channel was closed, the reason for closing it is what counts.
  template <class Work>
  void supervise(Work&& work) {
    try {
      std::forward<Work>(work)();
    } catch (const std::exception&) {
      check();
      throw;
    }
  }

 private:
  kvferry::BaseTransferChannel& channel_;
  mutable std::mutex mutex_;
  mutable std::condition_variable ended_;
  std::optional<Failure> reason_;
  asio::io_context io_context_{1};
  asio::signal_set signals_;
  std::thread thread_;
};

}  // namespace example
