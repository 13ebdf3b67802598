// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// Registers transports at the conformance suite, without the suite's tests: see `conformance.hpp`.

#include <kvferry/testing/conformance_registry.hpp>
#include <kvferry/testing/run_main.hpp>

/// Puts one or more transports to the suite. At global scope, once for each prefix in a program.
/// @param prefix of the tests' names, an identifier.
/// @param ... types that model `kvferry::testing::ConformanceTraits`, fully qualified or of `kvferry::testing`.
#define KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(prefix, ...)                  \
  namespace kvferry::inline KVFERRY_ABI::testing {                                              \
  static const bool prefix##IsPutToTheTest [[maybe_unused]] =               \
      ConformanceRegistry::instance().add_transports<__VA_ARGS__>(#prefix); \
  }                                                                         \
  static_assert(true, "so that a semicolon may follow")
