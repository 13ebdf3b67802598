// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_REGION_TABLE_HPP
#define KVFERRY_KIT_REGION_TABLE_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/memory_region.hpp>

#include <kvferry/kit/region_list.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A channel's regions. Of a removed region only the number remains, which is smaller than the next one. Thread-safe.
class RegionTable {
 public:
  /// Regions at a time. A handshake that claims more is not one.
  static constexpr std::size_t max_regions = 1024;
  /// Numbers in a channel's life: one bit of a range on the wire is taken (docs/wire_protocol.md).
  static constexpr std::uint32_t max_number = (std::uint32_t{1} << 31) - 1;

  explicit RegionTable(std::span<const MemoryRegion> regions) : list_(RegionList::of(regions)) {}

  [[nodiscard]] std::shared_ptr<const RegionList> now() const {
    const std::lock_guard lock(mutex_);
    return list_;
  }

  /// @param prepare called with the future region; may throw, and then the region is not entered.
  /// @param undo called with a prepared region that could not be entered because memory is used up.
  /// @throws TransferError `errc::resource_limit`, and the exceptions of `prepare`.
  template <class Prepare, class Undo>
  std::uint32_t add(const MemoryRegion& region, Prepare prepare, Undo undo) {
    const std::lock_guard adding(adding_mutex_);
    LocalRegion added{region, 0};
    {
      const std::lock_guard lock(mutex_);
      const std::size_t taken = list_->all().size() + leaving_;
      if (taken >= max_regions || list_->next() > max_number) {
        throw TransferError(errc::resource_limit, "there are " + std::to_string(taken) +
                                                      " regions, those included that are being removed, of " +
                                                      std::to_string(max_regions) + ", and the next number is " +
                                                      std::to_string(list_->next()));
      }
      added.number = list_->next();
    }
    prepare(added);
    try {
      const std::lock_guard lock(mutex_);
      std::vector<LocalRegion> regions = list_->all();
      regions.push_back(added);
      replace(std::move(regions), added.number + 1);
    } catch (...) {
      undo(added);
      throw;
    }
    return added.number;
  }

  template <class Prepare>
  std::uint32_t add(const MemoryRegion& region, Prepare prepare) {
    return add(region, std::move(prepare), [](const LocalRegion&) {});
  }

  /// Takes a region out. It counts as one until `gone`.
  /// @return nothing if there is none; `refusal` is why. If it throws, nothing has changed.
  [[nodiscard]] std::optional<LocalRegion> remove(std::uint32_t number, errc& refusal) {
    const std::lock_guard lock(mutex_);
    const LocalRegion* const found = list_->find(number);
    if (found == nullptr) {
      refusal = list_->refusal(number);
      return std::nullopt;
    }
    const LocalRegion removed = *found;
    std::vector<LocalRegion> regions = list_->all();
    std::erase_if(regions, [&](const LocalRegion& region) { return region.number == number; });
    replace(std::move(regions), list_->next());
    ++leaving_;
    return removed;
  }

  /// Nothing uses a removed region any more.
  void gone() {
    const std::lock_guard lock(mutex_);
    --leaving_;
  }

 private:
  void replace(std::vector<LocalRegion> regions, std::uint32_t next) {
    const auto old = std::exchange(list_, std::make_shared<const RegionList>(std::move(regions), next, list_->given()));
    old->outdate();
  }

  std::mutex adding_mutex_;  ///< One at a time: numbers are given in the order in which regions appear.
  mutable std::mutex mutex_;
  std::shared_ptr<const RegionList> list_;
  std::size_t leaving_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_REGION_TABLE_HPP
