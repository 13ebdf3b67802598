// SPDX-License-Identifier: Apache-2.0
#include "supervisor.hpp"

#include <fmt/core.h>
#include <asio/post.hpp>

#include <csignal>
#include <system_error>

namespace example {

Supervisor::Supervisor(kvferry::BaseTransferChannel& channel)
    : channel_(channel), signals_(io_context_, SIGINT, SIGTERM) {
  signals_.async_wait([this](std::error_code ec, int signal) {
    if (!ec) {
      end(ExitCode::interrupted, fmt::format("interrupted by {}", signal == SIGINT ? "SIGINT" : "SIGTERM"));
    }
  });
  thread_ = std::thread([this] { io_context_.run(); });
}

Supervisor::~Supervisor() {
  channel_.close();
  asio::post(io_context_, [this] { signals_.cancel(); });
  thread_.join();
}

void Supervisor::end(ExitCode code, const std::string& line) {
  {
    const std::lock_guard lock(mutex_);
    if (reason_.has_value()) {
      return;
    }
    reason_.emplace(code, line);
  }
  ended_.notify_all();
  channel_.close();
}

void Supervisor::check() const {
  const std::lock_guard lock(mutex_);
  if (reason_.has_value()) {
    throw Failure(*reason_);
  }
}

void Supervisor::wait_until(std::chrono::steady_clock::time_point when) const {
  std::unique_lock lock(mutex_);
  if (ended_.wait_until(lock, when, [this] { return reason_.has_value(); })) {
    throw Failure(*reason_);
  }
}

}  // namespace example
