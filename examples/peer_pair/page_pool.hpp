// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/memory_region.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace example {

/// Memory in pages of equal size, as an inference server has it for its KV caches: allotted and touched once, at start.
class PagePool {
 public:
  /// @param shuffle_seed decides the order in which pages are handed out.
  /// @throws Failure if there is not enough memory.
  PagePool(std::size_t page_size, std::size_t page_count, std::uint64_t shuffle_seed);

  [[nodiscard]] kvferry::MemoryRegion region() const noexcept {
    return {memory_.get(), page_size_ * page_count_, page_size_};
  }
  [[nodiscard]] std::size_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] std::size_t page_count() const noexcept { return page_count_; }

  /// Takes free pages. They come in no order: in a server, too, they are whatever earlier requests gave back.
  /// @throws std::length_error if there are fewer.
  [[nodiscard]] std::vector<std::uint64_t> take(std::size_t count);

 private:
  struct Unmap {
    std::size_t size;
    void operator()(std::byte* memory) const noexcept;
  };

  std::size_t page_size_;
  std::size_t page_count_;
  std::unique_ptr<std::byte, Unmap> memory_;
  std::vector<std::uint64_t> free_;
};

}  // namespace example
