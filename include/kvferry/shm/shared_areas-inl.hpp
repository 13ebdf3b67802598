// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/shared_areas.hpp>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include <kvferry/detail/process.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

// Regions may be older and younger than any other static object. To a forked child, memory that it has inherited is like any
// other.
KVFERRY_INLINE constinit PerProcess<SharedAreas> areas_of_process;

}  // namespace internal

KVFERRY_INLINE SharedAreas& SharedAreas::of_process() { return areas_of_process.here(); }

KVFERRY_INLINE void SharedAreas::enter(SharedArea area) {
  const std::lock_guard lock(mutex_);
  auto changed = std::make_shared<List>(*list_);
  changed->insert(std::ranges::upper_bound(*changed, area.data, std::less<>(), &SharedArea::data), std::move(area));
  list_ = std::move(changed);
  generation_.fetch_add(1, std::memory_order_release);
}

KVFERRY_INLINE void SharedAreas::leave(const std::byte* data) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    auto changed = std::make_shared<List>(*list_);
    std::erase_if(*changed, [&](const SharedArea& area) { return area.data == data; });
    list_ = std::move(changed);
  } catch (const std::bad_alloc&) {
    list_ = none_;  // the others become memory like any other
  }
  generation_.fetch_add(1, std::memory_order_release);
}

KVFERRY_INLINE std::shared_ptr<const SharedAreas::List> SharedAreas::now() const {
  const std::lock_guard lock(mutex_);
  return list_;
}

KVFERRY_INLINE const SharedAreas::List& SharedAreasView::list() {
  SharedAreas& areas = SharedAreas::of_process();
  // Read before the list: what changes in between is seen the next time.
  if (const auto generation = areas.generation(); generation != generation_) {
    list_ = areas.now();
    generation_ = generation;
  }
  return *list_;
}

KVFERRY_INLINE const SharedArea* SharedAreasView::find(const std::byte* address) {
  const auto& all = list();
  const auto behind = std::ranges::upper_bound(all, address, std::less<>(), &SharedArea::data);
  return behind == all.begin() ? nullptr : &*std::prev(behind);
}

KVFERRY_INLINE bool SharedAreasView::cover(std::span<const iovec> pieces) {
  const SharedArea* area = nullptr;
  return std::ranges::all_of(pieces, [&](const iovec& piece) {
    const auto* const begin = static_cast<const std::byte*>(piece.iov_base);
    const auto inside = [&] {
      const auto offset = reinterpret_cast<std::uintptr_t>(begin) - reinterpret_cast<std::uintptr_t>(area->data);
      return offset <= area->size && piece.iov_len <= area->size - offset;
    };
    if (area == nullptr || !inside()) {
      area = find(begin);
    }
    return area != nullptr && inside();
  });
}

KVFERRY_INLINE const SharedArea* SharedAreasView::whole(const std::byte* data, std::size_t size) {
  const SharedArea* const area = find(data);
  return area != nullptr && area->data == data && area->size == size ? area : nullptr;
}

}  // namespace kvferry::shm
