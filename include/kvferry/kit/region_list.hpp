// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_REGION_LIST_HPP
#define KVFERRY_KIT_REGION_LIST_HPP

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/error.hpp>
#include <kvferry/memory_region.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// An immutable snapshot of the regions of a channel. When the channel's regions change, there is a new list, and this
/// one is marked as outdated. A caller that looks regions up often keeps the list and gets a new one only then.
class RegionList {
 public:
  /// @param regions ordered by number. @param next the number that the next region gets.
  /// @param given how many regions the channel was made with.
  RegionList(std::vector<LocalRegion> regions, std::uint32_t next, std::uint32_t given)
      : regions_(std::move(regions)), next_(next), given_(given) {}

  /// Of regions that are numbered as they come.
  [[nodiscard]] static std::shared_ptr<const RegionList> of(std::span<const MemoryRegion> regions) {
    std::vector<LocalRegion> numbered;
    numbered.reserve(regions.size());
    for (const MemoryRegion& region : regions) {
      numbered.push_back({region, static_cast<std::uint32_t>(numbered.size())});
    }
    const auto next = static_cast<std::uint32_t>(numbered.size());
    return std::make_shared<const RegionList>(std::move(numbered), next, next);
  }

  [[nodiscard]] const std::vector<LocalRegion>& all() const noexcept { return regions_; }
  /// @return null if there is none; `refusal` says why.
  [[nodiscard]] const LocalRegion* find(std::uint32_t number) const noexcept { return find_region(regions_, number); }
  /// The reason why there is no region of this number.
  [[nodiscard]] errc refusal(std::uint32_t number) const noexcept {
    return number < next_ ? errc::region_gone : errc::unknown_region;
  }
  [[nodiscard]] std::uint32_t next() const noexcept { return next_; }
  /// Smaller numbers are of regions that the channel was made with.
  [[nodiscard]] std::uint32_t given() const noexcept { return given_; }

  /// Whether a region has been added or removed since. From any thread.
  [[nodiscard]] bool outdated() const noexcept { return outdated_.load(std::memory_order_acquire); }
  void outdate() const noexcept { outdated_.store(true, std::memory_order_release); }

 private:
  const std::vector<LocalRegion> regions_;
  const std::uint32_t next_;
  const std::uint32_t given_;
  mutable std::atomic<bool> outdated_{false};
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_REGION_LIST_HPP
