// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace kvferry {

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

}  // namespace kvferry
