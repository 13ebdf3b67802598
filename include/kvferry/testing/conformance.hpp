// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The conformance suite: tests of `BaseTransferChannel`'s promises, for any transport. Use it in one file of a test
/// program that links GoogleTest:
/// @code
/// #include <kvferry/testing/conformance.hpp>
///
/// struct MyTraits {
///   static std::unique_ptr<kvferry::BaseTransferChannel> make_channel(kvferry::ChannelOptions options) {
///     return std::make_unique<MyChannel>(std::move(options));
///   }
/// };
/// KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(My, MyTraits);
/// @endcode `ConformanceTraits` describes the optional members of traits. `main` is GoogleTest's, or `run_main`, which also
/// counts the skipped tests. A test is skipped, with the reason, if the transport lacks its capability (`Capabilities`).
///
/// That file takes half a minute to compile. If that is too long, include `conformance_transports.hpp` instead, which
/// has the macro without the tests, and each `*_suite.hpp` in a source file of its own. Link these files as object
/// files: the linker would leave them out of a static library.
///
/// The tests of processes run the test program again, with `--gtest_filter`; Linux only.

#include <kvferry/testing/arguments_suite.hpp>
#include <kvferry/testing/batches_suite.hpp>
#include <kvferry/testing/cancellation_suite.hpp>
#include <kvferry/testing/checksums_suite.hpp>
#include <kvferry/testing/closing_suite.hpp>
#include <kvferry/testing/completion_queue_suite.hpp>
#include <kvferry/testing/completion_suite.hpp>
#include <kvferry/testing/concurrency_suite.hpp>
#include <kvferry/testing/conformance_transports.hpp>
#include <kvferry/testing/connect_suite.hpp>
#include <kvferry/testing/deadlines_suite.hpp>
#include <kvferry/testing/ending_suite.hpp>
#include <kvferry/testing/lifecycle_suite.hpp>
#include <kvferry/testing/metadata_suite.hpp>
#include <kvferry/testing/notifications_suite.hpp>
#include <kvferry/testing/notify_suite.hpp>
#include <kvferry/testing/one_sided_suite.hpp>
#include <kvferry/testing/ordering_suite.hpp>
#include <kvferry/testing/paired_suite.hpp>
#include <kvferry/testing/peers_suite.hpp>
#include <kvferry/testing/process_suite.hpp>
#include <kvferry/testing/ranges_suite.hpp>
#include <kvferry/testing/regions_suite.hpp>
#include <kvferry/testing/side_message_suite.hpp>
#include <kvferry/testing/tokens_suite.hpp>
