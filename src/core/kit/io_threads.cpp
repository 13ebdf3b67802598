// SPDX-License-Identifier: Apache-2.0
#include "io_threads.hpp"

#include <asio/post.hpp>

#include <algorithm>
#include <atomic>
#include <string>

#include "core/thread.hpp"

namespace kvferry::kit {

IoThreads::IoThreads(std::size_t count, PollPolicy poll)
    : poller_(std::make_shared<Poller>(poll)),
      context_(static_cast<int>(std::max<std::size_t>(count, 1))),
      work_(context_.get_executor()) {
  threads_.reserve(std::max<std::size_t>(count, 1));
  try {
    for (std::size_t i = 0; i < std::max<std::size_t>(count, 1); ++i) {
      threads_.push_back(start_thread("kvferry-io/" + std::to_string(i), [this] { run(); }));
    }
  } catch (...) {
    finish();
    throw;
  }
}

IoThreads::~IoThreads() { finish(); }

void IoThreads::finish() {
  work_.reset();
  for (auto& thread : threads_) {
    thread.join();
  }
  threads_.clear();
}

void IoThreads::run() {
  poller_->enter();
  const auto passed = std::make_shared<std::atomic<bool>>();
  // What is ready now, not what comes of it: connections that aren't looked at post their next turn, and might go on for
  // ever while those that are looked at wait.
  const auto run_ready = [this, passed] {
    passed->store(false);
    asio::post(context_, [passed] { passed->store(true); });
    while (!passed->load() && context_.poll_one() != 0) {
    }
  };
  while (context_.run_one() != 0) {
    poller_->look(run_ready);
  }
}

}  // namespace kvferry::kit
