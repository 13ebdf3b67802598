// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/range_descriptors.hpp>

#include <bit>

#include <kvferry/error.hpp>

#include <kvferry/kit/blocks.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// A range as a frame has it.
struct Described {
  RangeDescriptor range;
  BlockDescriptor block;
  std::uint32_t region = 0;
  bool in_blocks = false;

  [[nodiscard]] std::uint64_t pieces() const noexcept {
    return in_blocks ? (block.skip + std::uint64_t{range.length} - 1) / block.size + 1 : 1;
  }
};

/// @return what makes it senseless.
KVFERRY_INLINE std::string read_next(std::span<const Descriptor>& descriptors, Described& described) {
  described.range = std::bit_cast<RangeDescriptor>(descriptors.front());
  descriptors = descriptors.subspan(1);
  described.region = described.range.region & ~RangeDescriptor::blocks;
  described.in_blocks = (described.range.region & RangeDescriptor::blocks) != 0;
  if (described.range.length > max_chunk_bytes) {
    return "range of " + std::to_string(described.range.length) + " bytes";
  }
  if (!described.in_blocks) {
    return {};
  }
  if (descriptors.empty()) {
    return "range whose blocks are not described";
  }
  described.block = std::bit_cast<BlockDescriptor>(descriptors.front());
  descriptors = descriptors.subspan(1);
  const BlockDescriptor& block = described.block;
  if (described.range.length == 0 || block.skip >= block.size || block.stride < block.size) {
    return "range of " + std::to_string(described.range.length) + " bytes from byte " + std::to_string(block.skip) +
           " of blocks of " + std::to_string(block.size) + " bytes at a stride of " + std::to_string(block.stride);
  }
  return {};
}

KVFERRY_INLINE errc refusal_of(const Described& described, const kit::RegionList& regions, Access needed) {
  const MemoryRegion* const found = regions.find(described.region);
  if (found == nullptr) {
    return regions.refusal(described.region);
  }
  const MemoryRegion& region = *found;
  if (!allows(region.peer_access, needed)) {
    return errc::access_denied;
  }
  std::uint64_t reach = described.range.length;  // of the last byte, from the offset
  if (described.in_blocks) {
    const std::uint64_t behind = described.block.skip + std::uint64_t{described.range.length} - 1;
    if (__builtin_mul_overflow(behind / described.block.size, described.block.stride, &reach) ||
        __builtin_add_overflow(reach, behind % described.block.size + 1, &reach)) {
      return errc::range_out_of_bounds;
    }
  }
  return described.range.offset > region.size || reach > region.size - described.range.offset
             ? errc::range_out_of_bounds
             : errc{};
}

}  // namespace internal

KVFERRY_INLINE void describe_range(const RemoteRange& range, std::uint64_t from, std::uint64_t length,
                                   std::vector<Descriptor>& descriptors) {
  const auto add = [&](std::uint64_t position, std::uint64_t bytes, std::uint32_t flag) {
    descriptors.push_back(std::bit_cast<Descriptor>(
        RangeDescriptor{range.offset + position, static_cast<std::uint32_t>(bytes), range.region | flag}));
  };
  const kit::Blocks blocks = kit::Blocks::of(range);
  if (length == 0) {
    add(0, 0, 0);
    return;
  }
  const std::uint64_t skip = from % blocks.size;
  // Blocks as large as a frame, and what lies in one block, need no more words than ranges that lie end to end.
  if (blocks.size > max_chunk_bytes || length <= blocks.size - skip) {
    blocks.for_each_piece(from, length, [&](std::uint64_t position, std::uint64_t part) { add(position, part, 0); });
    return;
  }
  add(from / blocks.size * blocks.stride, length, RangeDescriptor::blocks);
  descriptors.push_back(std::bit_cast<Descriptor>(
      BlockDescriptor{blocks.stride, static_cast<std::uint32_t>(blocks.size), static_cast<std::uint32_t>(skip)}));
}

KVFERRY_INLINE RangesRead read_ranges(const FrameHeader& header, std::span<const Descriptor> descriptors,
                                      const kit::RegionList& regions, Access needed, std::vector<iovec>& pieces) {
  RangesRead result;
  std::uint64_t bytes = 0;
  std::uint64_t count = 0;
  pieces.reserve(descriptors.size());
  while (!descriptors.empty()) {
    Described described;
    if (result.violation = read_next(descriptors, described); !result.violation.empty()) {
      return result;
    }
    bytes += described.range.length;
    count += described.pieces();
    if (count > max_chunk_objects) {
      result.violation = "ranges in more than " + std::to_string(max_chunk_objects) + " pieces";
      return result;
    }
    if (result.status) {
      continue;  // what comes behind a refused range has to make sense all the same
    }
    if (const errc refusal = refusal_of(described, regions, needed); refusal != errc{}) {
      result.status = refusal;
      continue;
    }
    std::byte* const begin = regions.find(described.region)->data + described.range.offset;
    if (!described.in_blocks) {
      if (described.range.length != 0) {
        pieces.push_back({begin, described.range.length});
      }
      continue;
    }
    const kit::Blocks blocks{described.block.size, described.block.stride, ~std::uint64_t{0}};
    blocks.for_each_piece(described.block.skip, described.range.length,
                          [&](std::uint64_t position, std::uint64_t part) {
                            pieces.push_back({begin + position, part});
                          });
  }
  if (bytes != header.payload_bytes) {
    result.violation =
        "ranges of " + std::to_string(bytes) + " bytes in all, payload of " + std::to_string(header.payload_bytes);
  }
  if (result.status || !result.violation.empty()) {
    pieces.clear();
  }
  return result;
}

}  // namespace kvferry::tcp
