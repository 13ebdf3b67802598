// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/copy.hpp>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include <kvferry/detail/fetch_ahead.hpp>
#include <kvferry/shm/pieces.hpp>
#include <kvferry/tcp/read_ahead.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Of a cache.
inline constexpr std::size_t line_bytes = 64;
/// The CPU's own fetching ahead ends with a page of memory, and the first access to the next one waits for its translation as
/// well. So the next page's first lines are asked for before this page is copied. More of them gained nothing.
inline constexpr std::size_t lines_ahead = 4;

#ifdef __SSE2__
// Copy whole lines to where a line begins. The stores are ordered by the caller.

KVFERRY_INLINE void stream_lines(std::byte* to, const std::byte* from, std::size_t bytes) noexcept {
  for (std::size_t at = 0; at < bytes; at += line_bytes) {
    const auto* const source = reinterpret_cast<const __m128i*>(from + at);
    auto* const target = reinterpret_cast<__m128i*>(to + at);
    const __m128i first = _mm_loadu_si128(source);
    const __m128i second = _mm_loadu_si128(source + 1);
    const __m128i third = _mm_loadu_si128(source + 2);
    const __m128i fourth = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, first);
    _mm_stream_si128(target + 1, second);
    _mm_stream_si128(target + 2, third);
    _mm_stream_si128(target + 3, fourth);
  }
}

/// The same for CPUs with AVX2, which copy a third more in the same time.
__attribute__((target("avx2"))) KVFERRY_INLINE void stream_wide_lines(std::byte* to, const std::byte* from,
                                                                      std::size_t bytes) noexcept {
  for (std::size_t at = 0; at < bytes; at += line_bytes) {
    const auto* const source = reinterpret_cast<const __m256i*>(from + at);
    auto* const target = reinterpret_cast<__m256i*>(to + at);
    const __m256i first = _mm256_loadu_si256(source);
    const __m256i second = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, first);
    _mm256_stream_si256(target + 1, second);
  }
}

/// @param stream copies whole lines.
template <class Stream>
void copy_streaming(std::byte* to, const std::byte* from, std::size_t bytes, Stream stream) noexcept {
  const std::size_t head =
      std::min(bytes, (line_bytes - reinterpret_cast<std::uintptr_t>(to) % line_bytes) % line_bytes);
  const std::size_t lines = (bytes - head) / line_bytes * line_bytes;
  std::memcpy(to, from, head);
  stream(to + head, from + head, lines);
  std::memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}
#endif

/// Copies what is contiguous on both sides at a time, or less.
/// @param most_from `(destination)`: the most bytes of a part that begins there.
/// @param copy_part of `(to, from, bytes)`.
template <class MostFrom, class CopyPart>
void copy_in_parts(std::span<const iovec> from, std::span<const iovec> to, MostFrom most_from,
                   CopyPart copy_part) noexcept {
  Pieces<iovec> sources(from);
  Pieces<iovec> destinations(to);
  while (!sources.empty() && !destinations.empty()) {
    const iovec source = sources.front();
    const iovec destination = destinations.front();
    const std::size_t length = std::min({source.iov_len, destination.iov_len, most_from(destination.iov_base)});
    sources.use(length);
    destinations.use(length);
    if (!sources.empty() && !destinations.empty()) {
      fetch_ahead(sources.front().iov_base, lines_ahead * line_bytes);
      fetch_ahead(destinations.front().iov_base, 1);
    }
    copy_part(static_cast<std::byte*>(destination.iov_base), static_cast<const std::byte*>(source.iov_base), length);
  }
}

}  // namespace internal

/// The C library streams from three quarters of the last cache on, by the piece. Memory that is not in the cache takes longer to
/// overwrite without (docs/performance.md): its lines are read first.
KVFERRY_INLINE void copy(std::span<const iovec> from, std::span<const iovec> to, Stores stores) noexcept {
#ifdef __SSE2__
  if (stores == Stores::streaming) {
    static const auto stream = __builtin_cpu_supports("avx2") ? stream_wide_lines : stream_lines;
    copy_in_parts(
        from, to, [](const void* destination) { return tcp::left_on_page(destination); },
        [](std::byte* target, const std::byte* source, std::size_t bytes) {
          copy_streaming(target, source, bytes, stream);
        });
    _mm_sfence();
    return;
  }
#endif
  copy_in_parts(
      from, to, [](const void* /*destination*/) { return std::numeric_limits<std::size_t>::max(); },
      [](std::byte* target, const std::byte* source, std::size_t bytes) { std::memcpy(target, source, bytes); });
}

}  // namespace kvferry::shm
