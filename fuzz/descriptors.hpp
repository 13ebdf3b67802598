// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// The open descriptors of this process, but for pipes: the fuzzer itself talks to its symbolizer through some.
[[nodiscard]] inline std::vector<std::string> open_descriptors() {
  std::vector<std::string> open;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code ec;
    auto what = std::filesystem::read_symlink(entry, ec).string();
    if (!what.starts_with("pipe:")) {
      open.push_back(entry.path().filename().string() + ": " + what);
    }
  }
  return open;
}

inline void print(const std::vector<std::string>& lines) {
  for (const std::string& line : lines) {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

}  // namespace kvferry::fuzz
