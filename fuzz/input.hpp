// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// A fuzzer's input, read from its beginning as choices and numbers; zeros when it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : bytes_(std::as_bytes(std::span(data, size))) {}

  [[nodiscard]] bool empty() const noexcept { return bytes_.empty(); }

  template <class Number = std::uint8_t>
  [[nodiscard]] Number number() {
    Number value{};
    const std::size_t size = std::min(sizeof(value), bytes_.size());
    if (size != 0) {
      std::memcpy(&value, bytes_.data(), size);
    }
    bytes_ = bytes_.subspan(size);
    return value;
  }
  [[nodiscard]] bool flag() { return (number() & 1) != 0; }
  /// One of `[0, choices)`, which are at most 256.
  [[nodiscard]] std::size_t choice(std::size_t choices) { return number() % choices; }
  /// Small or large, near a power of two or anything.
  [[nodiscard]] std::uint64_t any_number() {
    switch (choice(4)) {
      case 0: return number();
      case 1: return (std::uint64_t{1} << choice(64)) + number() - 128U;
      case 2: return number<std::uint16_t>();
      default: return number<std::uint64_t>();
    }
  }
  [[nodiscard]] std::vector<std::byte> bytes(std::size_t count) {
    const auto taken = bytes_.first(std::min(count, bytes_.size()));
    bytes_ = bytes_.subspan(taken.size());
    return {taken.begin(), taken.end()};
  }
  [[nodiscard]] std::span<const std::byte> rest() const noexcept { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

/// Ends the fuzzer, which then keeps its input, unless this holds.
inline void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "does not hold: %s\n", what);
    std::abort();
  }
}

}  // namespace kvferry::fuzz
