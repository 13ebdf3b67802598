// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/xxh3.hpp>
#include <kvferry/detail/xxh3_pieces.hpp>

#ifdef KVFERRY_WIDE_XXH3
#include <kvferry/detail/wide_xxh3.hpp>
#endif

namespace kvferry::inline KVFERRY_ABI {

KVFERRY_INLINE std::uint64_t xxh3_of(std::span<const iovec> pieces, std::size_t skipped, std::size_t length) noexcept {
#ifdef KVFERRY_WIDE_XXH3
  static const auto widest = __builtin_cpu_supports("avx512f") ? xxh3_avx512
                             : __builtin_cpu_supports("avx2")  ? xxh3_avx2
                                                               : nullptr;
  if (widest != nullptr) {
    return widest(pieces.data(), pieces.size(), skipped, length);
  }
#endif
  return xxh3_of_pieces(pieces.data(), pieces.size(), skipped, length);
}

}  // namespace kvferry
