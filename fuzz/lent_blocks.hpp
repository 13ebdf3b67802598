// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <kvferry/transfer_spec.hpp>

#include "rdma/slice_table.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

/// Registered memory for operations' objects: blocks that are allocations of their own, each with its own key. An object lies at
/// the end of its block, so that AddressSanitizer sees a byte too many.
class LentBlocks {
 public:
  static constexpr std::size_t block_bytes = 4096;

  /// @param each blocks of either kind: that peers may write to and that they may not.
  LentBlocks(SliceTable& table, std::size_t each) {
    blocks_.resize(2 * each);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      auto& block = blocks_[i];
      block.resize(block_bytes, static_cast<std::byte>(i));
      const std::uint64_t begin = address_of(block.data());
      table.add({begin, begin + block_bytes, key(i), key(i), is_open(i), false});
    }
    next_ = {0, 1};
  }

  /// @return nothing if all are lent.
  [[nodiscard]] std::optional<MutableBuffer> lend(bool open, std::size_t size) {
    std::size_t& next = next_[open ? 0 : 1];
    if (next >= blocks_.size()) {
      return std::nullopt;
    }
    const std::span<std::byte> block(blocks_[next]);
    next += 2;
    const auto object = block.last(size);
    return MutableBuffer(object.data(), object.size());
  }

  /// The key of what lies there.
  [[nodiscard]] std::optional<std::uint32_t> key_of(std::uint64_t address, std::size_t size) const {
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const std::uint64_t begin = address_of(blocks_[i].data());
      if (address >= begin && address + size <= begin + block_bytes) {
        return key(i);
      }
    }
    return std::nullopt;
  }

 private:
  [[nodiscard]] static bool is_open(std::size_t block) { return block % 2 == 0; }
  [[nodiscard]] static std::uint32_t key(std::size_t block) { return static_cast<std::uint32_t>(100 + block); }

  std::vector<std::vector<std::byte>> blocks_;
  std::array<std::size_t, 2> next_{};
};

/// The present contents of these objects.
[[nodiscard]] inline std::vector<std::vector<std::byte>> contents(std::span<const MutableBuffer> objects) {
  std::vector<std::vector<std::byte>> copies;
  for (const MutableBuffer object : objects) {
    copies.emplace_back(object.begin(), object.end());
  }
  return copies;
}

[[nodiscard]] inline bool equal(std::span<const MutableBuffer> objects,
                                const std::vector<std::vector<std::byte>>& expected) {
  return std::ranges::equal(objects, expected, [](MutableBuffer object, const std::vector<std::byte>& bytes) {
    return std::ranges::equal(object, bytes);
  });
}

}  // namespace kvferry::rdma::testing
