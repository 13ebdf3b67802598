// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "paged_cache.hpp"

namespace example {

/// "64 KiB", "1.5 GiB".
[[nodiscard]] std::string human_bytes(std::uint64_t bytes);

/// Counts how much of a cache has been moved, and since when. Shows a bar on a terminal, one plain line elsewhere; on stderr.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  Progress(std::string_view program, std::string_view what, const PagedCache& cache,
           Clock::time_point started = Clock::now());
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();

  void advance(std::uint64_t bytes);

  /// Stops the clock and prints the summary, on stdout.
  void finish(std::string_view mode, std::string_view path);

 private:
  void draw() const;
  void leave_line();

  std::string program_;
  std::string what_;
  std::uint64_t total_bytes_;
  std::size_t total_pages_;
  std::uint64_t moved_bytes_ = 0;
  bool on_terminal_;
  bool line_is_open_ = false;
  Clock::time_point drawn_;
  Clock::time_point started_;
};

}  // namespace example
