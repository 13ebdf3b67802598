// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "paged_cache.hpp"

namespace example {

/// The pages of a cache, divided into batches. Both sides must divide alike.
class CacheBatches {
 public:
  /// The cache must outlive this.
  CacheBatches(const PagedCache& cache, std::size_t pages_per_batch)
      : cache_(cache), pages_per_batch_(pages_per_batch) {}

  [[nodiscard]] std::size_t count() const noexcept {
    return cache_.page_count() / pages_per_batch_ + (cache_.page_count() % pages_per_batch_ == 0 ? 0 : 1);
  }
  [[nodiscard]] std::vector<kvferry::MutableBuffer> pages(std::size_t batch) const {
    return cache_.pages(first_page(batch), page_count(batch));
  }
  [[nodiscard]] std::uint64_t bytes(std::size_t batch) const noexcept {
    return cache_.bytes_in(first_page(batch), page_count(batch));
  }

  /// A batch's part of a page table.
  [[nodiscard]] std::span<const std::uint64_t> part_of(std::span<const std::uint64_t> page_table,
                                                       std::size_t batch) const noexcept {
    return page_table.subspan(first_page(batch), page_count(batch));
  }

 private:
  [[nodiscard]] std::size_t first_page(std::size_t batch) const noexcept { return batch * pages_per_batch_; }
  [[nodiscard]] std::size_t page_count(std::size_t batch) const noexcept {
    return std::min(pages_per_batch_, cache_.page_count() - first_page(batch));
  }

  const PagedCache& cache_;
  std::size_t pages_per_batch_;
};

}  // namespace example
