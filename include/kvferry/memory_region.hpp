// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_MEMORY_REGION_HPP
#define KVFERRY_MEMORY_REGION_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <vector>

namespace kvferry::inline KVFERRY_ABI {

/// The one-sided operations that peers may use on a region. The channel itself may always use its own regions.
enum class Access : std::uint8_t {
  none = 0,        ///< Peers reach nothing here; send and recv still work on its buffers.
  read = 1,        ///< Peers may read.
  write = 2,       ///< Peers may write.
  read_write = 3,  ///< Both.
};

/// Whether `granted` includes everything in `wanted`.
[[nodiscard]] constexpr bool allows(Access granted, Access wanted) noexcept {
  return (static_cast<unsigned>(granted) & static_cast<unsigned>(wanted)) == static_cast<unsigned>(wanted);
}

/// Memory that a channel offers to its peers, divided into pages of equal size.
///
/// Page `i` lies at `data + i * page_size`. The memory stays the caller's, and kvferry never frees it. It must stay
/// valid until the channel's `close()`, or `BaseTransferChannel::remove_region`, has returned. `BaseTransferChannel`
/// describes transfers of memory that is unmapped before. A channel may have several regions. They are numbered in the
/// order in which they are given to the constructor and to `BaseTransferChannel::add_region`. LMCache: `buffer_ptr`,
/// `buffer_size`, `align_bytes`, one per channel.
///
/// If peers name the region's bytes only by `TransferSpec::remote_ranges`, `page_size` has no effect: set it to `size`.
struct MemoryRegion {
  std::byte* data = nullptr;
  std::size_t size = 0;       ///< Bytes; a multiple of `page_size`.
  std::size_t page_size = 0;  ///< Bytes; at least 1.
  Access peer_access = Access::read_write;

  /// For memory of a device (a GPU): a dma-buf's descriptor, and the offset in the dma-buf at which the region begins;
  /// `data` is the memory's address. The descriptor is used only during the channel's construction, or `add_region`.
  /// Such memory can be used for writes and reads over RDMA. A channel of another transport refuses the region. -1:
  /// ordinary memory. docs/guide.md says more.
  int dmabuf_fd = -1;
  std::uint64_t dmabuf_offset = 0;

  [[nodiscard]] std::size_t page_count() const noexcept { return page_size == 0 ? 0 : size / page_size; }
};

/// One of a channel's own regions, with its number.
struct LocalRegion : MemoryRegion {
  std::uint32_t number = 0;  ///< Peers name the region by it. No other region of the channel ever gets it.
};

/// A peer's region, as the peer describes it.
struct RemoteRegion {
  std::uint64_t size = 0;
  std::uint64_t page_size = 0;
  Access access = Access::none;
  std::uint32_t number = 0;  ///< `TransferSpec::remote_region`, `RemoteRange::region`.

  [[nodiscard]] std::uint64_t page_count() const noexcept { return page_size == 0 ? 0 : size / page_size; }
  friend bool operator==(const RemoteRegion&, const RemoteRegion&) = default;
};

/// Finds a region by its number. @param regions a vector or span of `LocalRegion`s or `RemoteRegion`s, ordered by
/// number.
/// @return null if there is none.
template <class Regions>
[[nodiscard]] auto find_region(const Regions& regions, std::uint32_t number) noexcept -> decltype(std::data(regions)) {
  // As long as none has been removed, each lies at its number.
  if (number < std::size(regions) && regions[number].number == number) {
    return &regions[number];
  }
  using Region = std::remove_cvref_t<decltype(*std::data(regions))>;
  const auto it = std::ranges::lower_bound(regions, number, {}, &Region::number);
  return it == std::ranges::end(regions) || it->number != number ? nullptr : &*it;
}

}  // namespace kvferry

#endif  // KVFERRY_MEMORY_REGION_HPP
