// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/copy.hpp>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace kvferry::inline KVFERRY_ABI::shm {

#ifdef __SSE2__
/// The C library streams from three quarters of the last cache on, by the piece. Memory that is not in the cache takes a fifth longer to
/// overwrite without (docs/performance.md): its lines are read first.
KVFERRY_INLINE void copy(std::byte* to, const std::byte* from, std::size_t bytes, Stores stores) noexcept {
  constexpr std::size_t line = 64;
  if (stores == Stores::cached || bytes < 2 * line) {
    std::memcpy(to, from, bytes);
    return;
  }
  const std::size_t head = (line - reinterpret_cast<std::uintptr_t>(to) % line) % line;
  std::memcpy(to, from, head);
  to += head;
  from += head;
  bytes -= head;
  for (; bytes >= line; bytes -= line, to += line, from += line) {
    const auto* const source = reinterpret_cast<const __m128i*>(from);
    auto* const target = reinterpret_cast<__m128i*>(to);
    const __m128i first = _mm_loadu_si128(source);
    const __m128i second = _mm_loadu_si128(source + 1);
    const __m128i third = _mm_loadu_si128(source + 2);
    const __m128i fourth = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, first);
    _mm_stream_si128(target + 1, second);
    _mm_stream_si128(target + 2, third);
    _mm_stream_si128(target + 3, fourth);
  }
  std::memcpy(to, from, bytes);
  _mm_sfence();
}
#else
KVFERRY_INLINE void copy(std::byte* to, const std::byte* from, std::size_t bytes, Stores) noexcept {
  std::memcpy(to, from, bytes);
}
#endif

}  // namespace kvferry::shm
