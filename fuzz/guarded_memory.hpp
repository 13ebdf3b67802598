// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// Memory for a peer's bytes between margins that nobody may touch: the kernel, which writes there as well, isn't seen by
/// AddressSanitizer.
class GuardedMemory {
 public:
  GuardedMemory(std::size_t size, std::string_view pattern) : all_(size + 2 * margin, canary), pattern_(pattern) {
    restore();
  }

  [[nodiscard]] std::span<std::byte> bytes() noexcept { return std::span(all_).subspan(margin, size()); }
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return std::span(all_).subspan(margin, size()); }
  [[nodiscard]] std::size_t size() const noexcept { return all_.size() - 2 * margin; }

  /// The first contents.
  [[nodiscard]] std::byte first_value(std::size_t offset) const noexcept {
    return static_cast<std::byte>(pattern_[offset % pattern_.size()]);
  }
  void restore() {
    for (std::size_t i = 0; i < size(); ++i) {
      bytes()[i] = first_value(i);
    }
  }
  [[nodiscard]] bool changed() const {
    for (std::size_t i = 0; i < size(); ++i) {
      if (bytes()[i] != first_value(i)) {
        return true;
      }
    }
    return false;
  }
  [[nodiscard]] bool margins_are_whole() const {
    const auto is_canary = [](std::byte byte) { return byte == canary; };
    return std::ranges::all_of(std::span(all_).first(margin), is_canary) &&
           std::ranges::all_of(std::span(all_).last(margin), is_canary);
  }

 private:
  static constexpr std::size_t margin = 4096;
  static constexpr std::byte canary{0xC5};

  std::vector<std::byte> all_;
  std::string_view pattern_;
};

}  // namespace kvferry::fuzz
