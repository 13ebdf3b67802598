// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <chrono>
#include <semaphore>
#include <stdexcept>
#include <thread>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// An executor with a thread of its own that can be held up: a channel that runs on it is then a peer that is there but
/// does nothing.
class PausableExecutor {
 public:
  PausableExecutor() : work_(context_.get_executor()), thread_([this] { context_.run(); }) {}
  PausableExecutor(const PausableExecutor&) = delete;
  PausableExecutor& operator=(const PausableExecutor&) = delete;
  ~PausableExecutor() {
    resume();
    work_.reset();
    thread_.join();
  }

  [[nodiscard]] asio::any_io_executor executor() { return context_.get_executor(); }

  /// When it returns, nothing runs on the executor until `resume`.
  void pause(std::chrono::milliseconds limit) {
    paused_ = true;
    asio::post(context_, [this] {
      entered_.release();
      gate_.acquire();
    });
    if (!entered_.try_acquire_for(limit)) {
      throw std::runtime_error("the executor's thread is blocked: something blocks on a channel's executor");
    }
  }

  void resume() {
    if (std::exchange(paused_, false)) {
      gate_.release();
    }
  }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::binary_semaphore entered_{0};
  std::binary_semaphore gate_{0};
  bool paused_ = false;
  std::thread thread_;
};

}  // namespace kvferry::testing
