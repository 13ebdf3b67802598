// SPDX-License-Identifier: Apache-2.0
#pragma once

// Memory that a thread of a test runs out of. To be included in one file of a program: it takes operator new's place.

#include <cstddef>
#include <cstdlib>
#include <new>

#include "common/allocation_limit.hpp"

// Not inlined, or compilers see that blocks of operator new are given to free. All forms that libraries use, or a sanitizer
// finds a block of its own operator new that is given to this delete.
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (void* const block = kvferry::test::allocate(size)) {
    return block;
  }
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return kvferry::test::allocate(size);
}
[[gnu::noinline]] void operator delete(void* block) noexcept { kvferry::test::release(block); }
[[gnu::noinline]] void operator delete(void* block, std::size_t) noexcept { kvferry::test::release(block); }
[[gnu::noinline]] void operator delete(void* block, const std::nothrow_t&) noexcept { kvferry::test::release(block); }
