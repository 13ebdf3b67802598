// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dirent.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include <kvferry/testing/traits.hpp>

namespace kvferry_test {

/// The open descriptors of this process, and what each stands for. A sanitizer's runtime reads the list of mappings, on
/// any thread and at any time, and has it open meanwhile; that one is left out.
inline std::map<int, std::string> open_descriptors() {
  constexpr std::string_view mappings = "/maps";
  struct Close {
    void operator()(DIR* folder) const noexcept { ::closedir(folder); }
  };
  const std::unique_ptr<DIR, Close> folder(::opendir("/proc/self/fd"));
  std::map<int, std::string> all;
  while (const dirent* const entry = folder ? ::readdir(folder.get()) : nullptr) {
    const int descriptor = std::atoi(entry->d_name);
    std::array<char, 256> target{};
    const ssize_t size = ::readlinkat(::dirfd(folder.get()), entry->d_name, target.data(), target.size());
    const std::string what(target.data(), size > 0 ? static_cast<std::size_t>(size) : 0);
    const bool sanitizers = kvferry::testing::sanitized && what.rfind("/proc/", 0) == 0 &&
                            what.size() > mappings.size() &&
                            what.compare(what.size() - mappings.size(), mappings.size(), mappings) == 0;
    if (size > 0 && descriptor != ::dirfd(folder.get()) && !sanitizers) {
      all[descriptor] = what;
    }
  }
  return all;
}

}  // namespace kvferry_test
