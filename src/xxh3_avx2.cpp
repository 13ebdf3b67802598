// SPDX-License-Identifier: Apache-2.0
// Compiled for CPUs with AVX2, so nothing is included whose functions others could share with it.
#include <kvferry/tcp/wide_xxh3.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvferry::inline KVFERRY_ABI::tcp {

std::uint64_t xxh3_avx2(const void* bytes, std::size_t size) noexcept { return XXH3_64bits(bytes, size); }

}  // namespace kvferry::tcp
