// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/event_descriptor.hpp>

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/standard_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE int make_event() {
  occupy_standard_descriptors();
  const int descriptor = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (descriptor < 0) {
    throw TransferError({errno, std::system_category()}, "cannot create an eventfd");
  }
  return descriptor;
}

}  // namespace internal

KVFERRY_INLINE EventDescriptor::EventDescriptor() : descriptor_(make_event()) {}

KVFERRY_INLINE EventDescriptor::~EventDescriptor() { ::close(descriptor_); }

KVFERRY_INLINE void EventDescriptor::set(int descriptor) noexcept {
  // Fails only when the counter is full, and then the event is set already.
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto size = ::write(descriptor, &one, sizeof(one));
}

KVFERRY_INLINE void EventDescriptor::clear() const noexcept {
  std::uint64_t count = 0;
  [[maybe_unused]] const auto size = ::read(descriptor_, &count, sizeof(count));
}

KVFERRY_INLINE std::unique_ptr<EventDescriptor> EventDescriptors::take() {
  {
    const std::lock_guard lock(mutex_);
    kept_.reserve(most_kept);  // so that nothing that comes back needs memory
    if (!kept_.empty()) {
      auto event = std::move(kept_.back());
      kept_.pop_back();
      return event;
    }
  }
  return std::make_unique<EventDescriptor>();
}

KVFERRY_INLINE void EventDescriptors::give_back(std::unique_ptr<EventDescriptor> event) noexcept {
  event->clear();
  const std::lock_guard lock(mutex_);
  if (kept_.size() < most_kept) {
    kept_.push_back(std::move(event));
  }
}

}  // namespace kvferry
