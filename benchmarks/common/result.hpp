// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "job.hpp"
#include "stream.hpp"
#include "usage.hpp"

namespace bench {

/// Microseconds.
struct Distribution {
  double p50 = 0;
  double p99 = 0;
  double p999 = 0;
  double max = 0;
};

/// How much a connection's adapter had to do whenever some of its work was done and more was to come: see
/// `kvferry::RdmaWindow`.
struct Window {
  std::uint64_t lists = 0;
  std::uint64_t drained = 0;
  double left = 0;
};

/// The figures of a job's timed part.
struct Result {
  std::string program;
  Job job;
  std::string path;  ///< How the bytes travelled, in the program's words.
  double seconds = 0;
  std::uint64_t batches = 0;
  Distribution latency;                    ///< Of a batch, from the call that starts it until it is done.
  std::optional<Distribution> submission;  ///< Of the call that starts it, where that doesn't wait for the end.
  double slowest_peer = 1;                 ///< Bytes a second of the slowest peer, as a part of the mean.
  std::optional<Window> window;            ///< The initiator's, with the warm-up; nothing where there is no such thing.
  Usage initiator;
  std::optional<Usage> target;  ///< Nothing where there is one process only.

  [[nodiscard]] double gigabytes_per_second() const;
  /// Of one side's usage.
  [[nodiscard]] double cpu_seconds_per_gib(const Usage& usage) const;
  [[nodiscard]] std::optional<double> syscalls_per_batch(const Usage& usage) const;
};

/// Puts together what the streams noted in the run that started at `started`.
void summarize(std::span<const Stream> streams, Clock::time_point started, Result& result);

/// Where results go.
struct ReportOptions {
  std::string json;  ///< File names; "-" is stdout, in the table's place. Empty: none.
  std::string csv;
};

/// Prints a line of the table for each result as it comes, and writes the files at the end.
class Report {
 public:
  explicit Report(ReportOptions options);
  void add(const Result& result);
  void finish() const;

 private:
  ReportOptions options_;
  bool table_;
  std::vector<Result> results_;
};

}  // namespace bench
