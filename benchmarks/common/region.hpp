// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "page_map.hpp"

namespace bench {

/// One side's memory. All of it is written to before anything is timed.
class Region {
 public:
  Region(std::size_t pages, std::size_t page_size);
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region();

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] std::span<std::byte> page(std::uint64_t index) const {
    return {data_ + index * page_size_, page_size_};
  }
  /// The part that a peer's pages are in.
  [[nodiscard]] std::span<std::byte> part(std::size_t pages_per_part, std::size_t index) const {
    return {data_ + index * pages_per_part * page_size_, pages_per_part * page_size_};
  }

  /// Gives each page a content of its own.
  void fill_as_source() const;
  /// Fills it with what no source page holds.
  void fill_as_destination() const;

 private:
  std::size_t page_size_;
  std::size_t size_;
  std::byte* data_;
};

/// Checks every page of the destination: what was moved is there whole, and where nothing was moved nothing changed.
/// @param destination_is_target whose pages the region has.
/// @param batches_moved for each stream, how many batches it has moved.
/// @return what is wrong, if anything.
[[nodiscard]] std::optional<std::string> verify(const Region& destination, const PageMap& map,
                                                bool destination_is_target,
                                                std::span<const std::uint64_t> batches_moved);

}  // namespace bench
