// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// An eventfd: readable from `set` to `clear`.
class EventDescriptor {
 public:
  /// @throws TransferError
  EventDescriptor();
  EventDescriptor(const EventDescriptor&) = delete;
  EventDescriptor& operator=(const EventDescriptor&) = delete;
  ~EventDescriptor();

  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }
  void set() const noexcept { set(descriptor_); }
  void clear() const noexcept;

  static void set(int descriptor) noexcept;

 private:
  const int descriptor_;
};

/// Event descriptors for calls that sleep a while. Some of those that come back are kept, lest every call make one; one
/// for each thread would be simpler, but a thread's objects are gone before those of the program. Thread-safe.
class EventDescriptors {
 public:
  /// @throws TransferError
  [[nodiscard]] std::unique_ptr<EventDescriptor> take();
  void give_back(std::unique_ptr<EventDescriptor> event) noexcept;

 private:
  static constexpr std::size_t most_kept = 16;

  std::mutex mutex_;
  std::vector<std::unique_ptr<EventDescriptor>> kept_;
};

}  // namespace kvferry
