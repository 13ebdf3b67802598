// SPDX-License-Identifier: Apache-2.0
#include "io_threads.hpp"

#include <algorithm>
#include <chrono>

namespace kvferry::kit {

IoThreads::IoThreads(std::size_t count, PollPolicy poll)
    : poll_{std::min<std::chrono::microseconds>(poll.spin, std::chrono::hours(1))}, context_(static_cast<int>(std::max<std::size_t>(count, 1))), work_(context_.get_executor()) {
  threads_.reserve(std::max<std::size_t>(count, 1));
  for (std::size_t i = 0; i < std::max<std::size_t>(count, 1); ++i) {
    threads_.emplace_back([this] { run(); });
  }
}

IoThreads::~IoThreads() {
  work_.reset();
  for (auto& thread : threads_) {
    thread.join();
  }
}

void IoThreads::run() {
  if (poll_.spin <= std::chrono::microseconds::zero()) {
    context_.run();
    return;
  }
  auto last_work = std::chrono::steady_clock::now();
  while (!context_.stopped()) {
    if (context_.poll() > 0) {
      last_work = std::chrono::steady_clock::now();
    } else if (std::chrono::steady_clock::now() - last_work > poll_.spin) {
      context_.run_one();
      last_work = std::chrono::steady_clock::now();
    }
  }
}

}  // namespace kvferry::kit
