// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The XXH3-64 (seed 0) of `length` bytes of these pieces of memory, one behind the other, by the widest vectors that this
/// CPU has and the library is compiled for.
/// @param skipped so many of the first piece's bytes, or all of them, don't count.
[[nodiscard]] KVFERRY_EXPORT std::uint64_t xxh3_of(std::span<const iovec> pieces, std::size_t skipped,
                                                   std::size_t length) noexcept;
/// The same of all of them.
[[nodiscard]] inline std::uint64_t xxh3_of(std::span<const iovec> pieces) noexcept {
  std::size_t length = 0;
  for (const iovec& piece : pieces) {
    length += piece.iov_len;
  }
  return xxh3_of(pieces, 0, length);
}

}  // namespace kvferry
