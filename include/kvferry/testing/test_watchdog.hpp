// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>

#include <kvferry/testing/traits.hpp>
#include <kvferry/testing/watchdog.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// How much slower than usual this machine is, as `KVFERRY_TEST_TIME_FACTOR` says; 1 where it says nothing.
[[nodiscard]] inline double time_factor() {
  const char* const text = std::getenv("KVFERRY_TEST_TIME_FACTOR");
  const double factor = text == nullptr ? 1 : std::atof(text);
  return factor > 1 ? factor : 1;
}

/// A duration as this machine takes it.
[[nodiscard]] inline std::chrono::milliseconds scaled(std::chrono::milliseconds duration) {
  return std::chrono::milliseconds(static_cast<long long>(static_cast<double>(duration.count()) * time_factor()));
}

/// The limit of each test: `KVFERRY_TEST_SECONDS`, or else 120 s, and 300 s under a sanitizer; times the machine's factor.
[[nodiscard]] inline std::chrono::milliseconds test_limit() {
  const char* const text = std::getenv("KVFERRY_TEST_SECONDS");
  const long long seconds = text == nullptr ? 0 : std::atoll(text);
  return scaled(std::chrono::seconds(seconds > 0 ? seconds : sanitized ? 300 : 120));
}

/// Gives each test a limit of its own, so that many can share a process: ends the process, and names the test, if one
/// does not end in time.
class TestWatchdog final : public ::testing::EmptyTestEventListener {
 public:
  void OnTestStart(const ::testing::TestInfo& test) override {
    watchdog_.emplace(std::string(test.test_suite_name()) + "." + test.name(), test_limit());
  }
  void OnTestEnd(const ::testing::TestInfo&) override { watchdog_.reset(); }

 private:
  std::optional<Watchdog> watchdog_;
};

}  // namespace kvferry::testing
