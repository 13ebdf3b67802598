// SPDX-License-Identifier: Apache-2.0
#pragma once

// How much memory a thread of a test gets, in a program of which one file includes failing_allocations.hpp.

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <limits>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

inline constexpr std::size_t unlimited_allocations = std::numeric_limits<std::size_t>::max();
/// How many a thread gets that begins now.
inline std::atomic<std::size_t> allocations_of_new_threads = unlimited_allocations;
/// How many more allocations this thread gets.
inline thread_local std::size_t allocations_left = allocations_of_new_threads;
/// How many more it has allocated than freed.
inline thread_local std::ptrdiff_t blocks_held = 0;
/// Whether it wanted more.
inline thread_local bool allocation_refused = false;

/// Whether this thread gets one more.
inline bool may_allocate() noexcept {
  if (allocations_left == 0) {
    allocation_refused = true;
    return false;
  }
  allocations_left -= std::size_t{allocations_left != unlimited_allocations};
  return true;
}

/// @return null if this thread gets no more.
inline void* allocate(std::size_t size) noexcept {
  void* const block = may_allocate() ? std::malloc(size == 0 ? 1 : size) : nullptr;
  blocks_held += block == nullptr ? 0 : 1;
  return block;
}

inline void release(void* block) noexcept {
  blocks_held -= block == nullptr ? 0 : 1;
  std::free(block);
}

}  // namespace kvferry::test
