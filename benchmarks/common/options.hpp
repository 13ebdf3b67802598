// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "job.hpp"
#include "program.hpp"
#include "result.hpp"

namespace bench {

/// A command line, parsed.
struct Options {
  Job job;  ///< Without page and batch.
  std::vector<std::size_t> pages;
  std::vector<std::size_t> batches;
  std::string listen;   ///< Not empty: this process is the target of an initiator elsewhere.
  std::string connect;  ///< Not empty: the target is there. Otherwise it is started here.
  bool target_on_stdin = false;
  ReportOptions report;
};

/// @return the exit code if there is nothing more to do (help, bad options), else -1.
int parse_options(const Program& program, int argc, char** argv, Options& options);

}  // namespace bench
