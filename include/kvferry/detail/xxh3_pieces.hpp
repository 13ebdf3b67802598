// SPDX-License-Identifier: Apache-2.0
#pragma once

// All of it in each file that includes this: there is no library to link, and each file may be for another CPU.
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#include <xxhash.h>
#undef XXH_INLINE_ALL
#else
#include <xxhash.h>
#endif

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Internal to each file, which may be compiled for another CPU than others.
static inline std::uint64_t xxh3_of_pieces(const iovec* pieces, std::size_t count, std::size_t skipped,
                                           std::size_t length) noexcept {
  if (count != 0 && pieces[0].iov_len - skipped >= length) {
    return XXH3_64bits(static_cast<const char*>(pieces[0].iov_base) + skipped, length);
  }
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (std::size_t i = 0; i < count && length != 0; ++i) {
    const std::size_t there = pieces[i].iov_len - skipped;
    const std::size_t part = there < length ? there : length;
    XXH3_64bits_update(&state, static_cast<const char*>(pieces[i].iov_base) + skipped, part);
    skipped = 0;
    length -= part;
  }
  return XXH3_64bits_digest(&state);
}

}  // namespace kvferry
