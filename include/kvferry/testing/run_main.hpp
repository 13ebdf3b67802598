// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <string_view>

namespace kvferry::testing {

/// Counts, for each transport, the tests of its capabilities that ran and those that were skipped, with the reasons.
class SkipReport final : public ::testing::EmptyTestEventListener {
 public:
  /// Whether the tests that were to run are all there are, so that the counts say something about the transport.
  [[nodiscard]] static bool complete_run() {
    const auto* unit_test = ::testing::UnitTest::GetInstance();
    return unit_test->test_to_run_count() == unit_test->total_test_count();
  }

  /// Whether there is a transport of which nothing was tested but what needs no capability.
  [[nodiscard]] bool skipped_all_of_a_transport() const {
    for (const auto& [transport, count] : counts_) {
      if (count.ran == 0 && count.skipped > 0) {
        return true;
      }
    }
    return false;
  }

  void OnTestEnd(const ::testing::TestInfo& test) override {
    const ::testing::TestResult& result = *test.result();
    bool needs_capability = false;
    for (int i = 0; i < result.test_property_count(); ++i) {
      needs_capability = needs_capability || std::string_view(result.GetTestProperty(i).key()) == "kvferry_requires";
    }
    Count& count = counts_[transport_of(test)];
    if (result.Skipped()) {
      ++reasons_[reason_of(result)];
      count.skipped += needs_capability ? 1 : 0;
    } else {
      count.ran += needs_capability ? 1 : 0;
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
    if (complete_run() && skipped_all_of_a_transport()) {
      std::printf("[  FAILED  ] everything that a transport can do was skipped\n");
    }
    std::fflush(stdout);
  }

 private:
  struct Count {
    int ran = 0;
    int skipped = 0;
  };

  /// Prefix and type of a typed test: "Tcp/OneSidedTest/OneLane" is of "Tcp/OneLane".
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
        return std::string(message.substr(0, message.find('\n')));
      }
    }
    return "no reason given";
  }

  std::map<std::string, Count> counts_;
  std::map<std::string, std::size_t> reasons_;
};

/// A `main` for programs with the conformance suite: GoogleTest's, with skips counted and listed at the end. A run of
/// all tests in which all that concerns what a transport can do was skipped fails.
[[nodiscard]] inline int run_main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  auto report = std::make_unique<SkipReport>();
  const SkipReport& skips = *report;
  ::testing::UnitTest::GetInstance()->listeners().Append(report.release());
  const int result = RUN_ALL_TESTS();
  return result == 0 && SkipReport::complete_run() && skips.skipped_all_of_a_transport() ? 1 : result;
}

}  // namespace kvferry::testing
