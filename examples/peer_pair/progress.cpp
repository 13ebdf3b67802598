// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <array>
#include <cstdio>

namespace example {
namespace {

constexpr std::size_t bar_width = 40;
constexpr std::chrono::milliseconds redraw_interval{100};

double gigabytes_per_second(std::uint64_t bytes, std::chrono::duration<double> time) {
  return time.count() > 0 ? static_cast<double>(bytes) / 1e9 / time.count() : 0;
}

}  // namespace

std::string human_bytes(std::uint64_t bytes) {
  constexpr std::array units{"bytes", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  auto value = static_cast<double>(bytes);
  while (value >= 1024 && unit + 1 < units.size()) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.4g} {}", value, units[unit]);
}

Progress::Progress(std::string_view program, std::string_view what, const PagedCache& cache, Clock::time_point started)
    : program_(program),
      what_(what),
      total_bytes_(cache.bytes()),
      total_pages_(cache.page_count()),
      on_terminal_(::isatty(STDERR_FILENO) == 1),
      started_(started) {
  if (on_terminal_) {
    line_is_open_ = true;
    draw();
  } else {
    fmt::print(stderr, "{}: {} {} in {} pages\n", program_, what_, human_bytes(total_bytes_), total_pages_);
  }
  drawn_ = started_;
}

Progress::~Progress() { leave_line(); }

void Progress::advance(std::uint64_t bytes) {
  moved_bytes_ += bytes;
  if (const auto now = Clock::now(); on_terminal_ && now - drawn_ >= redraw_interval) {
    draw();
    drawn_ = now;
  }
}

void Progress::finish(std::string_view mode, std::string_view path) {
  const std::chrono::duration<double> time = Clock::now() - started_;
  if (on_terminal_) {
    draw();
    leave_line();
  }
  fmt::print("{}: moved {} bytes in {} pages, {:.3f} s, {:.2f} GB/s, mode {}, path {}\n", program_, moved_bytes_,
             total_pages_, time.count(), gigabytes_per_second(moved_bytes_, time), mode, path);
  std::fflush(stdout);
}

void Progress::draw() const {
  const double done = total_bytes_ == 0 ? 1 : static_cast<double>(moved_bytes_) / static_cast<double>(total_bytes_);
  const auto filled = static_cast<std::size_t>(done * static_cast<double>(bar_width));
  fmt::print(stderr, "\r{}: {} [{:#<{}}{:.<{}}] {:3.0f}% {:.2f} GB/s", program_, what_, "", filled, "",
             bar_width - filled, done * 100, gigabytes_per_second(moved_bytes_, Clock::now() - started_));
}

void Progress::leave_line() {
  if (line_is_open_) {
    fmt::print(stderr, "\n");
    line_is_open_ = false;
  }
}

}  // namespace example
