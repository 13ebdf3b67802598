// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/transfer_spec.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "page_pool.hpp"

namespace example {

/// How many pages of `page_size` bytes it takes to hold `bytes` bytes.
[[nodiscard]] constexpr std::uint64_t pages_for(std::uint64_t bytes, std::uint64_t page_size) noexcept {
  return bytes / page_size + (bytes % page_size == 0 ? 0 : 1);
}

/// One KV cache: a run of bytes, cut into pages that lie all over a pool. The last page may be partly used.
class PagedCache {
 public:
  /// Takes the pages from the pool, which must outlive the cache.
  PagedCache(PagePool& pool, std::uint64_t bytes)
      : region_(pool.region()), bytes_(bytes), indexes_(pool.take(pages_for(bytes, pool.page_size()))) {}

  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] std::size_t page_count() const noexcept { return indexes_.size(); }

  /// The page table: where in the pool each page of the cache lies.
  [[nodiscard]] std::span<const std::uint64_t> indexes() const noexcept { return indexes_; }

  /// The used bytes of a page.
  [[nodiscard]] kvferry::MutableBuffer page(std::size_t number) const {
    const std::uint64_t offset = number * region_.page_size;
    return {region_.data + indexes_[number] * region_.page_size,
            static_cast<std::size_t>(std::min<std::uint64_t>(region_.page_size, bytes_ - offset))};
  }

  /// Pages in a row, as the objects of a batch.
  [[nodiscard]] std::vector<kvferry::MutableBuffer> pages(std::size_t first, std::size_t count) const {
    std::vector<kvferry::MutableBuffer> buffers;
    buffers.reserve(count);
    for (std::size_t number = first; number < first + count; ++number) {
      buffers.push_back(page(number));
    }
    return buffers;
  }

  /// The used bytes of pages in a row.
  [[nodiscard]] std::uint64_t bytes_in(std::size_t first, std::size_t count) const noexcept {
    const std::uint64_t page_size = region_.page_size;
    return std::min(bytes_, (first + count) * page_size) - std::min(bytes_, first * page_size);
  }

  /// The byte at an offset of the cache.
  [[nodiscard]] std::byte& at(std::uint64_t offset) const {
    return page(offset / region_.page_size)[offset % region_.page_size];
  }

 private:
  kvferry::MemoryRegion region_;
  std::uint64_t bytes_;
  std::vector<std::uint64_t> indexes_;
};

}  // namespace example
