// SPDX-License-Identifier: Apache-2.0
// The common part of the programs that submit writes of very many descriptors.
#pragma once

#include <fmt/core.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

namespace bench {

struct Descriptors {
  std::size_t count = 100'000;
  std::size_t block = 4096;
  std::size_t rounds = 7;

  /// So that blocks don't touch: those that do are one.
  [[nodiscard]] std::size_t stride() const { return block + 64; }
  [[nodiscard]] std::size_t region_bytes() const { return (count * stride() / block + 1) * block; }

  /// The places of scattered blocks, in blocks.
  [[nodiscard]] std::vector<std::uint64_t> scattered(std::uint64_t seed) const {
    std::vector<std::uint64_t> order(count);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::ranges::shuffle(order, std::mt19937_64(seed));
    return order;
  }

  void add_options(CLI::App& app) {
    app.add_option("--descriptors", count, "How many a write has")
        ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 24))
        ->capture_default_str();
    app.add_option("--block", block, "Bytes of each")
        ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
        ->capture_default_str();
    app.add_option("--rounds", rounds, "How often all is measured")->check(CLI::Range(1, 1000))->capture_default_str();
  }

  static void print_head() {
    fmt::print(
        "| write by | submit, ns a descriptor (median) | (least) | GB/s in all |\n| --- | ---: | ---: | ---: |\n");
  }

  /// Prints how long submitting took, and how long until all was there.
  /// @param prepare for each round, before the clock starts. @param wait until all is there.
  void measure(std::string_view what, const std::function<void()>& prepare, const std::function<void()>& submit,
               const std::function<void()>& wait) const {
    std::vector<double> submitting;
    std::vector<double> moving;
    for (std::size_t round = 0; round < rounds; ++round) {
      prepare();
      const auto begin = Clock::now();
      submit();
      submitting.push_back(nanoseconds_since(begin));
      wait();
      moving.push_back(nanoseconds_since(begin));
    }
    const auto number = static_cast<double>(count);
    fmt::print("| {} | {:.1f} | {:.1f} | {:.2f} |\n", what, median(submitting) / number,
               *std::ranges::min_element(submitting) / number, number * static_cast<double>(block) / median(moving));
  }

 private:
  using Clock = std::chrono::steady_clock;

  static double nanoseconds_since(Clock::time_point begin) {
    return std::chrono::duration<double, std::nano>(Clock::now() - begin).count();
  }
  static double median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
  }
};

}  // namespace bench
