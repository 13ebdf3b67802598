// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

[[nodiscard]] inline std::uint64_t address_of(const void* pointer) noexcept {
  return reinterpret_cast<std::uintptr_t>(pointer);
}

/// Registered memory of one key: `[begin, end)`.
struct Slice {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::uint32_t local_key = 0;
  std::uint32_t remote_key = 0;
  bool peers_may_write = false;
  bool device_memory = false;  ///< The CPU must not touch it.
};

/// Finds the key of an address. The next address is nearly always in the same slice.
class SliceTable {
 public:
  void add(const Slice& slice) {
    longest_ = std::max(longest_, slice.end - slice.begin);
    slices_.insert(std::ranges::upper_bound(slices_, slice.begin, {}, &Slice::begin), slice);
  }
  void clear() { slices_.clear(); }
  [[nodiscard]] bool empty() const noexcept { return slices_.empty(); }

  /// @param hint the slice that was found last, or null; becomes the slice that is found now. @return null if there is
  ///   none.
  const Slice* find(std::uint64_t address, const Slice*& hint) const noexcept {
    if (hint != nullptr && address >= hint->begin && address < hint->end) {
      return hint;
    }
    // From the last one that begins before it; others can have it only where the caller's regions overlap.
    for (auto it = std::ranges::upper_bound(slices_, address, {}, &Slice::begin); it != slices_.begin();) {
      --it;
      if (address < it->end) {
        hint = &*it;
        return hint;
      }
      if (address - it->begin >= longest_) {
        break;
      }
    }
    return nullptr;
  }

  /// Whether all of `[address, address + size)` is registered; nothing always is.
  [[nodiscard]] bool covers(std::uint64_t address, std::size_t size, const Slice*& hint) const noexcept {
    while (size != 0) {
      const Slice* const slice = find(address, hint);
      if (slice == nullptr) {
        return false;
      }
      if (slice->end - address >= size) {
        return true;
      }
      size -= static_cast<std::size_t>(slice->end - address);
      address = slice->end;
    }
    return true;
  }

 private:
  std::vector<Slice> slices_;  ///< By their beginnings.
  std::uint64_t longest_ = 0;
};

}  // namespace kvferry::rdma
