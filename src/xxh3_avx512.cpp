// SPDX-License-Identifier: Apache-2.0
// Compiled for CPUs with AVX-512, so nothing is included whose functions others could share with it.
#include <kvferry/detail/wide_xxh3.hpp>
#include <kvferry/detail/xxh3_pieces.hpp>

namespace kvferry::inline KVFERRY_ABI {

std::uint64_t xxh3_avx512(const iovec* pieces, std::size_t count, std::size_t skipped, std::size_t length) noexcept {
  return xxh3_of_pieces(pieces, count, skipped, length);
}

}  // namespace kvferry
