// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/blocking_transfer.hpp>

#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void BlockingTransfer::complete(std::error_code cause, std::size_t transferred) {
  const std::lock_guard lock(mutex_);
  cause_ = cause;
  transferred_ = transferred;
  over_.store(true, std::memory_order_release);
  ended_.notify_one();
  if (event_) {
    event_->set();
  }
}

KVFERRY_INLINE int BlockingTransfer::descriptor() {
  const std::lock_guard lock(mutex_);
  if (!event_) {
    event_ = events_->take();
    if (over()) {
      event_->set();
    }
  }
  return event_->descriptor();
}

KVFERRY_INLINE std::size_t BlockingTransfer::wait(std::error_code& cause) {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return over(); });
  if (event_) {
    events_->give_back(std::move(event_));
  }
  cause = cause_;
  return transferred_;
}

}  // namespace kvferry::kit
