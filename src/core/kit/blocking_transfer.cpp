// SPDX-License-Identifier: Apache-2.0
#include "blocking_transfer.hpp"

#include "core/event_descriptor.hpp"

namespace kvferry::kit {
namespace {

/// One a thread, lest every call make one.
EventDescriptor& event_of_this_thread() {
  thread_local EventDescriptor event;
  return event;
}

}  // namespace

void BlockingTransfer::complete(std::error_code cause, std::size_t transferred) {
  const std::lock_guard lock(mutex_);
  cause_ = cause;
  transferred_ = transferred;
  over_.store(true, std::memory_order_release);
  ended_.notify_one();
  if (descriptor_ != -1) {
    EventDescriptor::set(descriptor_);
  }
}

int BlockingTransfer::descriptor() {
  const std::lock_guard lock(mutex_);
  if (descriptor_ == -1) {
    descriptor_ = event_of_this_thread().descriptor();
    if (over()) {
      EventDescriptor::set(descriptor_);
    }
  }
  return descriptor_;
}

std::size_t BlockingTransfer::wait(std::error_code& cause) {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return over(); });
  if (descriptor_ != -1) {
    event_of_this_thread().clear();
  }
  cause = cause_;
  return transferred_;
}

}  // namespace kvferry::kit
