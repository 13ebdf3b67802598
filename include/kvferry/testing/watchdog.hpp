// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Ends the process if a test does not end: a channel that blocks for ever (in `close`, in a destructor, in a blocking
/// call) can't be made to stop, so there is nothing to go on with.
class Watchdog {
 public:
  Watchdog(std::string what, std::chrono::milliseconds limit) : what_(std::move(what)), limit_(limit) {
    // A signal to the process is for the threads that are tested.
    sigset_t all;
    sigset_t before;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { watch(); });
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, limit_, [this] { return done_; })) {
      std::fprintf(stderr, "%s has not ended within %lld ms: something blocks for ever\n", what_.c_str(),
                   static_cast<long long>(limit_.count()));
      std::abort();
    }
  }

  const std::string what_;
  const std::chrono::milliseconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::thread thread_;
};

}  // namespace kvferry::testing
