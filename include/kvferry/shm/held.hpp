// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// A share of the resources that all of this process's connections hold for their peers. The destructor gives it back.
/// @tparam Of the kind of resource: a tag.
template <class Of>
class Held {
 public:
  /// @return nothing if all together would be more than `bound`.
  [[nodiscard]] static std::optional<Held> take(std::uint64_t amount, std::uint64_t bound) noexcept {
    const std::uint64_t before = all_.fetch_add(amount, std::memory_order_relaxed);
    if (amount > bound || before > bound - amount) {
      all_.fetch_sub(amount, std::memory_order_relaxed);
      return std::nullopt;
    }
    return Held(amount);
  }

  Held() = default;
  Held(Held&& other) noexcept : amount_(std::exchange(other.amount_, 0)) {}
  Held& operator=(Held&& other) noexcept {
    std::swap(amount_, other.amount_);
    return *this;
  }
  ~Held() { all_.fetch_sub(amount_, std::memory_order_relaxed); }

 private:
  explicit Held(std::uint64_t amount) noexcept : amount_(amount) {}

  static inline std::atomic<std::uint64_t> all_{0};
  std::uint64_t amount_ = 0;
};

}  // namespace kvferry::shm
