// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/blocking_transfer.hpp>

#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void BlockingTransfer::complete(std::error_code cause, std::size_t transferred) {
  cause_ = cause;
  transferred_ = transferred;
  if (state_.exchange(State::over, std::memory_order_acq_rel) == State::polled) {
    return;  // the waiting thread sees it by itself: no lock, and nobody to wake
  }
  const std::lock_guard lock(mutex_);
  told_ = true;
  ended_.notify_one();
  if (event_) {
    event_->set();
  }
}

KVFERRY_INLINE bool BlockingTransfer::await() noexcept {
  auto expected = State::polled;
  awaited_ = awaited_ || state_.compare_exchange_strong(expected, State::awaited, std::memory_order_acq_rel);
  return awaited_;
}

KVFERRY_INLINE int BlockingTransfer::descriptor() {
  const std::lock_guard lock(mutex_);
  if (!event_) {
    event_ = events_->take();
    if (!await() || told_) {
      event_->set();
    }
  }
  return event_->descriptor();
}

KVFERRY_INLINE std::size_t BlockingTransfer::wait(std::error_code& cause) {
  if (await()) {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return told_; });
  }
  if (event_) {
    events_->give_back(std::move(event_));
  }
  cause = cause_;
  return transferred_;
}

}  // namespace kvferry::kit
