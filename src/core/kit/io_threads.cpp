// SPDX-License-Identifier: Apache-2.0
#include "io_threads.hpp"

#include <algorithm>

namespace kvferry::kit {

IoThreads::IoThreads(std::size_t count, PollPolicy poll)
    : poller_(std::make_shared<Poller>(poll)),
      context_(static_cast<int>(std::max<std::size_t>(count, 1))),
      work_(context_.get_executor()) {
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
  poller_->enter();
  while (context_.run_one() != 0) {
    poller_->look([this] { context_.poll(); });
  }
}

}  // namespace kvferry::kit
