// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <pthread.h>

#include <cstddef>
#include <functional>

#include <kvferry/testing/traits.hpp>

namespace kvferry_test {

/// The stack that a calling thread needs, according to the guide ("Limits"). Without optimisation, and with a sanitizer,
/// functions take several times as much.
#if defined(__OPTIMIZE__)
inline constexpr std::size_t small_stack = (kvferry::testing::sanitized ? 8 : 1) * (std::size_t{64} << 10);
#else
inline constexpr std::size_t small_stack = 8 * (std::size_t{64} << 10);
#endif

/// Calls the function on a thread whose stack is no larger.
inline void on_small_stack(const std::function<void()>& function) {
  pthread_attr_t attributes;
  ASSERT_EQ(::pthread_attr_init(&attributes), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&attributes, small_stack), 0);
  pthread_t thread{};
  const auto run = [](void* given) -> void* {
    (*static_cast<const std::function<void()>*>(given))();
    return nullptr;
  };
  const int failed =
      ::pthread_create(&thread, &attributes, run, const_cast<void*>(static_cast<const void*>(&function)));
  ::pthread_attr_destroy(&attributes);
  ASSERT_EQ(failed, 0);
  EXPECT_EQ(::pthread_join(thread, nullptr), 0);
}

}  // namespace kvferry_test
