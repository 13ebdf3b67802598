// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>

#include <kvferry/kit/operation.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Measures how long the peer has been sending something that comes in several messages. Small steps don't reset it:
/// otherwise a peer that sends a message now and then would never be late.
class PartsClock {
 public:
  static constexpr std::size_t least_progress = std::size_t{64} << 10;

  /// A part has come.
  void came(std::size_t bytes, bool last) {
    if (last) {
      since_.reset();
      return;
    }
    bytes_ = since_ ? bytes_ + bytes : 0;
    if (!since_ || bytes_ >= least_progress) {
      since_ = kit::Clock::now();
      bytes_ = 0;
    }
  }
  void stop() noexcept { since_.reset(); }

  /// The time of the last progress; nothing if no more messages are expected.
  [[nodiscard]] const std::optional<kit::Clock::time_point>& since() const noexcept { return since_; }

 private:
  std::optional<kit::Clock::time_point> since_;
  std::size_t bytes_ = 0;
};

}  // namespace kvferry::rdma
