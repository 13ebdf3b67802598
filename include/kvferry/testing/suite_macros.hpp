// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <kvferry/testing/conformance_test.hpp>

// A suite of typed tests whose bodies are ordinary member functions: compiled once, however many transports are put to
// them.

#define KVFERRY_TESTING_PARENS ()
#define KVFERRY_TESTING_EXPAND(...) \
  KVFERRY_TESTING_EXPAND2(KVFERRY_TESTING_EXPAND2(KVFERRY_TESTING_EXPAND2(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND2(...) \
  KVFERRY_TESTING_EXPAND3(KVFERRY_TESTING_EXPAND3(KVFERRY_TESTING_EXPAND3(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND3(...) \
  KVFERRY_TESTING_EXPAND4(KVFERRY_TESTING_EXPAND4(KVFERRY_TESTING_EXPAND4(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND4(...) __VA_ARGS__

#define KVFERRY_TESTING_EACH(Suite, ...) \
  __VA_OPT__(KVFERRY_TESTING_EXPAND(KVFERRY_TESTING_EACH_STEP(Suite, __VA_ARGS__)))
#define KVFERRY_TESTING_EACH_STEP(Suite, Name, ...)                                       \
  TYPED_TEST_P(Suite, Name) { static_cast<typename TestFixture::Bodies&>(*this).Name(); } \
  __VA_OPT__(KVFERRY_TESTING_EACH_AGAIN KVFERRY_TESTING_PARENS(Suite, __VA_ARGS__))
#define KVFERRY_TESTING_EACH_AGAIN() KVFERRY_TESTING_EACH_STEP

/// Defines and registers the typed test suite `Suite`.
/// @param Tests a class derived from `ConformanceBase`.
/// @param ... its member functions that are tests, at most two dozen.
#define KVFERRY_TESTING_SUITE(Suite, Tests, ...)        \
  template <class Traits>                               \
  class Suite : public ConformanceTest<Tests, Traits> { \
   public:                                              \
    using Bodies = Tests;                               \
  };                                                    \
  TYPED_TEST_SUITE_P(Suite);                            \
  KVFERRY_TESTING_EACH(Suite, __VA_ARGS__)              \
  REGISTER_TYPED_TEST_SUITE_P(Suite, __VA_ARGS__)
