// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <functional>
#include <thread>
#include <utility>

namespace bench {

/// The thread on which a target serves its initiator. To be the target's last member: it uses the others until it ends.
class ServingThread {
 public:
  /// To be called once. @param serve returns when it has been asked to stop, or has nothing more to do.
  void start(std::function<void(const std::stop_token&)> serve) {
    thread_ = std::jthread([this, serve = std::move(serve)](const std::stop_token& stop) {
      try {
        serve(stop);
      } catch (...) {
        failure_ = std::current_exception();
      }
    });
  }

  /// Asks it to stop and waits until it has. @throws what `serve` threw.
  void finish() {
    thread_.request_stop();
    thread_.join();
    if (failure_) {
      std::rethrow_exception(failure_);
    }
  }

 private:
  std::exception_ptr failure_;
  std::jthread thread_;
};

}  // namespace bench
