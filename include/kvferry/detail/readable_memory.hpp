// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Bytes from `address` to the end of its page of memory. Pages may be larger; none is smaller.
[[nodiscard]] inline std::size_t left_on_page(const void* address) noexcept {
  constexpr std::uintptr_t page = 4096;
  return page - reinterpret_cast<std::uintptr_t>(address) % page;
}

/// As many pieces as a call takes (IOV_MAX).
inline constexpr std::size_t looked_at_once = 1024;

/// Finds out whether the CPU may read memory, without reading it itself, which would end the process: the kernel copies a
/// byte of each page.
/// @param copy has the kernel copy these bytes, at most `looked_at_once`, to a place that nobody reads. @return how many
///   were copied, as a system call does.
template <class Copy>
[[nodiscard]] bool kernel_can_read(std::span<const iovec> pieces, Copy copy) noexcept {
  std::array<iovec, looked_at_once> bytes;
  std::size_t count = 0;
  const auto look = [&] {
    // The side that may be gone is the one that the kernel reads as for write(2), so that mappings of devices can be sent.
    const auto read = copy(std::span<const iovec>(bytes).first(count));
    return read == static_cast<ssize_t>(std::exchange(count, 0));
  };
  for (const iovec& piece : pieces) {
    auto* byte = static_cast<std::byte*>(piece.iov_base);
    for (std::size_t left = piece.iov_len; left != 0;) {
      // The kernel would wait for the memory of one byte after the other. Where there is none, this does nothing.
      __builtin_prefetch(byte);
      bytes[count++] = {byte, 1};
      if (count == bytes.size() && !look()) {
        return false;
      }
      const std::size_t on_page = std::min(left, left_on_page(byte));
      byte += on_page;
      left -= on_page;
    }
  }
  return count == 0 || look();
}

}  // namespace kvferry
