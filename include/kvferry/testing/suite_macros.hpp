// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <kvferry/testing/conformance_test.hpp>

// A suite of tests whose bodies are ordinary member functions: compiled once, for any number of transports.

#define KVFERRY_TESTING_PARENS ()
#define KVFERRY_TESTING_EXPAND(...) \
  KVFERRY_TESTING_EXPAND2(KVFERRY_TESTING_EXPAND2(KVFERRY_TESTING_EXPAND2(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND2(...) \
  KVFERRY_TESTING_EXPAND3(KVFERRY_TESTING_EXPAND3(KVFERRY_TESTING_EXPAND3(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND3(...) \
  KVFERRY_TESTING_EXPAND4(KVFERRY_TESTING_EXPAND4(KVFERRY_TESTING_EXPAND4(__VA_ARGS__)))
#define KVFERRY_TESTING_EXPAND4(...) __VA_ARGS__

#define KVFERRY_TESTING_EACH(Tests, ...) \
  __VA_OPT__(KVFERRY_TESTING_EXPAND(KVFERRY_TESTING_EACH_STEP(Tests, __VA_ARGS__)))
#define KVFERRY_TESTING_EACH_STEP(Tests, Name, ...)                         \
  {#Name, ::kvferry::testing::ConformanceTest<Tests>::maker(&Tests::Name)}, \
      __VA_OPT__(KVFERRY_TESTING_EACH_AGAIN KVFERRY_TESTING_PARENS(Tests, __VA_ARGS__))
#define KVFERRY_TESTING_EACH_AGAIN() KVFERRY_TESTING_EACH_STEP

/// Defines the test suite `Suite`, which runs for all transports of the program. In a header or a source file.
/// @param Tests a class derived from `ConformanceBase`.
/// @param ... its member functions that are tests, at most two dozen.
#define KVFERRY_TESTING_SUITE(Suite, Tests, ...)                                                \
  inline const bool Suite##IsDefined = ::kvferry::testing::ConformanceRegistry::instance().add( \
      ::kvferry::testing::SuiteDefinition{#Suite, __FILE__, __LINE__, {KVFERRY_TESTING_EACH(Tests, __VA_ARGS__)}})
