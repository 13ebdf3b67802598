// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file The conformance suite: what `BaseTransferChannel` promises, as tests that any transport can be put to. In one
/// file of a test program that links GoogleTest:
/// @code
/// #include <kvferry/testing/conformance.hpp>
///
/// struct MyTraits {
///   static std::unique_ptr<kvferry::BaseTransferChannel> make_channel(kvferry::ChannelOptions options) {
///     return std::make_unique<MyChannel>(std::move(options));
///   }
/// };
/// KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(My, MyTraits);
/// @endcode See `ConformanceTraits` for what traits may say besides. `main` is GoogleTest's, or `run_main`, which also
/// counts what was skipped. Tests of what a transport cannot do (`Capabilities`) are skipped, with the reason.
///
/// The tests of processes run the test program again, with `--gtest_filter`; Linux only.

#include <kvferry/testing/arguments_suite.hpp>
#include <kvferry/testing/batches_suite.hpp>
#include <kvferry/testing/cancellation_suite.hpp>
#include <kvferry/testing/closing_suite.hpp>
#include <kvferry/testing/completion_suite.hpp>
#include <kvferry/testing/concurrency_suite.hpp>
#include <kvferry/testing/connect_suite.hpp>
#include <kvferry/testing/deadlines_suite.hpp>
#include <kvferry/testing/lifecycle_suite.hpp>
#include <kvferry/testing/notifications_suite.hpp>
#include <kvferry/testing/one_sided_suite.hpp>
#include <kvferry/testing/ordering_suite.hpp>
#include <kvferry/testing/paired_suite.hpp>
#include <kvferry/testing/process_suite.hpp>
#include <kvferry/testing/run_main.hpp>
#include <kvferry/testing/side_message_suite.hpp>
#include <kvferry/testing/tokens_suite.hpp>

/// Puts one or more transports to the suite. At global scope, once for each prefix in a program.
/// @param prefix of the tests' names, an identifier.
/// @param ... types that model `kvferry::testing::ConformanceTraits`, fully qualified.
#define KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(prefix, ...)                                          \
  namespace kvferry::testing {                                                                      \
  using prefix##ConformanceTypes = ::testing::Types<__VA_ARGS__>;                                   \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, ArgumentsTest, prefix##ConformanceTypes, TraitsNames);     \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, BatchesTest, prefix##ConformanceTypes, TraitsNames);       \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, CancellationTest, prefix##ConformanceTypes, TraitsNames);  \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, ClosingTest, prefix##ConformanceTypes, TraitsNames);       \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, CompletionTest, prefix##ConformanceTypes, TraitsNames);    \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, ConcurrencyTest, prefix##ConformanceTypes, TraitsNames);   \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, ConnectTest, prefix##ConformanceTypes, TraitsNames);       \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, DeadlinesTest, prefix##ConformanceTypes, TraitsNames);     \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, LifecycleTest, prefix##ConformanceTypes, TraitsNames);     \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, NotificationsTest, prefix##ConformanceTypes, TraitsNames); \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, OneSidedTest, prefix##ConformanceTypes, TraitsNames);      \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, OrderingTest, prefix##ConformanceTypes, TraitsNames);      \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, PairedTest, prefix##ConformanceTypes, TraitsNames);        \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, ProcessesTest, prefix##ConformanceTypes, TraitsNames);     \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, SideMessageTest, prefix##ConformanceTypes, TraitsNames);   \
  INSTANTIATE_TYPED_TEST_SUITE_P(prefix, TokensTest, prefix##ConformanceTypes, TraitsNames);        \
  }                                                                                                 \
  static_assert(true, "so that a semicolon may follow")
