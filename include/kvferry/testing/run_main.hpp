// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/testing/conformance_registry.hpp>
#include <kvferry/testing/test_watchdog.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Counts the tests that ran and the skipped ones, with the reasons. A fully skipped group is a failure: a test suite
/// that was selected as a whole, or, in a run of all tests, a transport for which only tests without capabilities ran.
///
/// If the variable `KVFERRY_SKIP_REPORT` names a file, each skipped test is also a line there, "reason<TAB>test", so
/// that skips can be counted over many processes.
class SkipReport final : public ::testing::EmptyTestEventListener {
 public:
  /// @param may_lack_capabilities whether a suite may be skipped as a whole because a transport lacks its capability.
  explicit SkipReport(bool may_lack_capabilities) : may_lack_capabilities_(may_lack_capabilities) {}

  /// The fully skipped groups. Call it after the run.
  [[nodiscard]] std::vector<std::string> skipped_groups() const {
    std::vector<std::string> groups = skipped_suites_;
    const auto* unit_test = ::testing::UnitTest::GetInstance();
    if (unit_test->test_to_run_count() == unit_test->total_test_count()) {
      for (const auto& [transport, count] : capability_tests_) {
        if (count.ran == 0 && count.skipped > 0) {
          groups.push_back("all that the transport " + transport + " could do");
        }
      }
    }
    return groups;
  }

  void OnTestEnd(const ::testing::TestInfo& test) override {
    const ::testing::TestResult& result = *test.result();
    const bool needs_capability = this->needs_capability(result);
    Count& count = capability_tests_[transport_of(test)];
    if (result.Skipped()) {
      const std::string reason = reason_of(result);
      ++reasons_[reason];
      report(test, reason);
      count.skipped += needs_capability ? 1 : 0;
    } else {
      count.ran += needs_capability ? 1 : 0;
    }
  }

  void OnTestSuiteEnd(const ::testing::TestSuite& suite) override {
    // A part of a suite, which a filter or a shard has picked, says nothing about the whole.
    if (suite.skipped_test_count() != suite.total_test_count() - suite.disabled_test_count() ||
        suite.skipped_test_count() == 0) {
      return;
    }
    bool for_want_of_capabilities = true;
    for (int i = 0; i < suite.total_test_count(); ++i) {
      const ::testing::TestInfo& test = *suite.GetTestInfo(i);
      for_want_of_capabilities =
          for_want_of_capabilities && (!test.result()->Skipped() || needs_capability(*test.result()));
    }
    if (!(may_lack_capabilities_ && for_want_of_capabilities)) {
      skipped_suites_.push_back("every test of " + std::string(suite.name()));
    }
  }

  void OnTestProgramEnd(const ::testing::UnitTest& unit_test) override {
    if (reasons_.empty()) {
      return;
    }
    std::printf("[ SKIPS    ] %d of %d tests were skipped:\n", unit_test.skipped_test_count(),
                unit_test.test_to_run_count());
    for (const auto& [reason, count] : reasons_) {
      std::printf("[ SKIPS    ] %5zu: %s\n", count, reason.c_str());
    }
    for (const std::string& group : skipped_groups()) {
      std::printf("[  FAILED  ] %s was skipped\n", group.c_str());
    }
    std::fflush(stdout);
  }

 private:
  struct Count {
    int ran = 0;
    int skipped = 0;
  };

  [[nodiscard]] static bool needs_capability(const ::testing::TestResult& result) {
    for (int i = 0; i < result.test_property_count(); ++i) {
      if (std::string_view(result.GetTestProperty(i).key()) == "kvferry_requires") {
        return true;
      }
    }
    return false;
  }

  /// "Tcp/OneSidedTest/OneLane" is of "Tcp/OneLane".
  [[nodiscard]] static std::string transport_of(const ::testing::TestInfo& test) {
    const std::string_view suite(test.test_suite_name());
    const auto first = suite.find('/');
    const auto last = suite.rfind('/');
    return first == last ? std::string() : std::string(suite.substr(0, first)) + std::string(suite.substr(last));
  }

  [[nodiscard]] static std::string reason_of(const ::testing::TestResult& result) {
    for (int i = 0; i < result.total_part_count(); ++i) {
      if (result.GetTestPartResult(i).skipped()) {
        const std::string_view message(result.GetTestPartResult(i).message());
        const std::string_view reason = message.substr(0, message.find('\n'));
        return reason.empty() ? "no reason given" : std::string(reason);
      }
    }
    return "no reason given";
  }

  static void report(const ::testing::TestInfo& test, const std::string& reason) {
    const char* const path = std::getenv("KVFERRY_SKIP_REPORT");
    if (path == nullptr) {
      return;
    }
    const std::string line = reason + "\t" + test.test_suite_name() + "." + test.name() + "\n";
    if (std::FILE* const file = std::fopen(path, "a"); file != nullptr) {
      std::fputs(line.c_str(), file);  // at once, at the end: several processes may write
      std::fclose(file);
    } else {
      std::perror(path);
    }
  }

  const bool may_lack_capabilities_;
  std::map<std::string, Count> capability_tests_;
  std::map<std::string, std::size_t> reasons_;
  std::vector<std::string> skipped_suites_;
};

/// Options of `run_main`.
struct RunOptions {
  /// Whether a suite may be skipped as a whole because the transport lacks its capability.
  bool may_lack_capabilities = true;
};

/// A `main` for test programs: GoogleTest's, with a limit for each test (`TestWatchdog`), and with skips counted and
/// listed at the end (`SkipReport`). Fails if a test does, if a group of tests was skipped as a whole, and if there are
/// transports but no suites for them.
[[nodiscard]] inline int run_main(int argc, char** argv, RunOptions options = {}) {
  ::testing::InitGoogleTest(&argc, argv);
  if (ConformanceRegistry::instance().lacks_suites()) {
    std::fputs("This program has transports, but no tests for them: its suites were not linked\n", stderr);
    return 1;
  }
  auto report = std::make_unique<SkipReport>(options.may_lack_capabilities);
  const SkipReport& skips = *report;
  auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
  listeners.Append(report.release());
  listeners.Append(std::make_unique<TestWatchdog>().release());
  const int result = RUN_ALL_TESTS();
  return result == 0 && !skips.skipped_groups().empty() ? 1 : result;
}

}  // namespace kvferry::testing
