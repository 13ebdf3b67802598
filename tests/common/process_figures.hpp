// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The resources that a process holds at this moment.
struct ProcessFigures {
  double resident_mib = 0;
  std::size_t descriptors = 0;

  /// @param process this one, or a child.
  [[nodiscard]] static ProcessFigures of(pid_t process = ::getpid()) {
    const std::string folder = "/proc/" + std::to_string(process);
    ProcessFigures figures;
    std::ifstream statm(folder + "/statm");
    long total = 0;
    long resident = 0;
    statm >> total >> resident;
    figures.resident_mib = static_cast<double>(resident) * static_cast<double>(::sysconf(_SC_PAGESIZE)) / (1 << 20);
    const std::filesystem::directory_iterator open(folder + "/fd");
    figures.descriptors = static_cast<std::size_t>(std::distance(begin(open), end(open)));
    return figures;
  }
};

}  // namespace kvferry::testing
