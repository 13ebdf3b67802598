// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_BLOCKS_HPP
#define KVFERRY_KIT_BLOCKS_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A sequence of bytes that lies in memory in blocks of one size at one distance; blocks that touch count as one. Both
/// sides of a transfer are such sequences, and their blocks need not have the same size.
struct Blocks {
  std::uint64_t size = 0;    ///< Of a block.
  std::uint64_t stride = 0;  ///< From the beginning of a block to the next one's.
  std::uint64_t bytes = 0;   ///< In all.

  /// Of a range or stride that has been checked.
  [[nodiscard]] static constexpr Blocks of(const RemoteRange& range) noexcept {
    const std::uint64_t bytes = range.size * range.count;
    return range.count == 1 || range.stride == range.size ? Blocks{bytes, bytes, bytes}
                                                          : Blocks{range.size, range.stride, bytes};
  }
  [[nodiscard]] static constexpr Blocks of(std::size_t buffer_size, const LocalStride& stride) noexcept {
    if (stride.block_size == 0 || buffer_size <= stride.block_size || stride.stride <= stride.block_size) {
      return {buffer_size, buffer_size, buffer_size};
    }
    const std::size_t count = (buffer_size - stride.block_size) / stride.stride + 1;
    return {stride.block_size, stride.stride, count * stride.block_size};
  }

  struct Place {
    std::uint64_t position = 0;   ///< From the first block's beginning.
    std::uint64_t available = 0;  ///< Bytes of the sequence that lie there end to end.
  };
  /// Where byte `offset` of the sequence lies.
  [[nodiscard]] constexpr Place place(std::uint64_t offset) const noexcept {
    if (offset < size) {
      return {offset, size - offset};
    }
    if (size == 0) {
      return {};
    }
    const std::uint64_t within = offset % size;
    return {offset / size * stride + within, size - within};
  }

  /// How many pieces of memory hold `[offset, offset + length)`; one if that is nothing.
  [[nodiscard]] constexpr std::uint64_t pieces(std::uint64_t offset, std::uint64_t length) const noexcept {
    return length == 0 || size == bytes ? 1 : (offset + length - 1) / size - offset / size + 1;
  }

  /// How many bytes from `offset` on lie in so many pieces.
  [[nodiscard]] constexpr std::uint64_t bytes_of_pieces(std::uint64_t offset, std::uint64_t count) const noexcept {
    return size == bytes || count > bytes / size ? bytes - offset
                                                 : std::min(bytes, (offset / size + count) * size) - offset;
  }

  /// Calls `function(position, length)` for each piece of memory that holds some of `[offset, offset + length)`.
  template <class Function>
  constexpr void for_each_piece(std::uint64_t offset, std::uint64_t length, Function function) const {
    while (length != 0) {
      const Place where = place(offset);
      const std::uint64_t part = std::min(where.available, length);
      function(where.position, part);
      offset += part;
      length -= part;
    }
  }
};

/// The bytes of a batch's objects on this side: their buffers, or blocks of them.
class LocalBytes {
 public:
  LocalBytes() = default;
  /// @param strides none, or one for each object; both outlive this.
  LocalBytes(std::span<const MutableBuffer> objects, std::span<const LocalStride> strides) noexcept
      : objects_(objects), strides_(strides) {}
  explicit LocalBytes(const TransferRequest& request) noexcept : LocalBytes(request.objects, request.local_strides) {}

  [[nodiscard]] std::span<const MutableBuffer> objects() const noexcept { return objects_; }
  [[nodiscard]] std::size_t count() const noexcept { return objects_.size(); }
  /// Whether some objects may be parts of their buffers.
  [[nodiscard]] bool strided() const noexcept { return !strides_.empty(); }

  [[nodiscard]] Blocks blocks(std::size_t object) const noexcept {
    return Blocks::of(objects_[object].size(), strided() ? strides_[object] : LocalStride{});
  }
  [[nodiscard]] std::size_t size(std::size_t object) const noexcept {
    return strided() ? blocks(object).bytes : objects_[object].size();
  }
  /// Where a byte of an object lies in its buffer.
  [[nodiscard]] Blocks::Place place(std::size_t object, std::size_t offset) const noexcept {
    return strided() ? blocks(object).place(offset) : Blocks::Place{offset, objects_[object].size() - offset};
  }
  /// The bytes of objects `[begin, end)`.
  [[nodiscard]] std::size_t total(std::size_t begin, std::size_t end) const noexcept {
    std::size_t bytes = 0;
    if (strided()) {
      for (std::size_t i = begin; i < end; ++i) {
        bytes += size(i);
      }
    } else {
      for (const MutableBuffer object : objects_.subspan(begin, end - begin)) {
        bytes += object.size();
      }
    }
    return bytes;
  }
  [[nodiscard]] std::size_t total() const noexcept { return total(0, count()); }

  /// Calls `function(data, length)` for each piece of memory that holds some of an object's bytes `[offset, offset + length)`.
  template <class Function>
  void for_each_piece(std::size_t object, std::size_t offset, std::size_t length, Function function) const {
    std::byte* const data = objects_[object].data();
    if (!strided()) {
      function(data + offset, length);
      return;
    }
    blocks(object).for_each_piece(offset, length,
                                  [&](std::uint64_t position, std::uint64_t part) { function(data + position, part); });
  }

 private:
  std::span<const MutableBuffer> objects_;
  std::span<const LocalStride> strides_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_BLOCKS_HPP
