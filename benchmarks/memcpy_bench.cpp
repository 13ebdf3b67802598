// SPDX-License-Identifier: Apache-2.0
// The same pages copied within a process: what the memory can do, and what two threads that hand bytes over can.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stop_token>
#include <thread>

#include "common/option_checks.hpp"
#include "common/program.hpp"

namespace bench {
namespace {

/// Bytes on their way from one thread to another. Both poll.
class HandOver {
 public:
  void give(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const std::uint64_t given = given_.load(std::memory_order_relaxed);
      const std::uint64_t waiting = given - taken_.load(std::memory_order_acquire);
      const std::size_t count = std::min({bytes.size(), ring_.size() - waiting, contiguous(given), step});
      if (count == 0) {
        continue;  // Without a store, for which the other thread would wait.
      }
      std::memcpy(ring_.data() + given % ring_.size(), bytes.data(), count);
      given_.store(given + count, std::memory_order_release);
      bytes = bytes.subspan(count);
    }
  }

  /// @return false if it was stopped before there was anything.
  bool take(std::span<std::byte> bytes, const std::stop_token& stopped) {
    while (!bytes.empty()) {
      const std::uint64_t taken = taken_.load(std::memory_order_relaxed);
      const std::uint64_t waiting = given_.load(std::memory_order_acquire) - taken;
      if (waiting == 0) {
        if (stopped.stop_requested()) {
          return false;
        }
        continue;
      }
      const std::size_t count = std::min({bytes.size(), waiting, contiguous(taken), step});
      std::memcpy(bytes.data(), ring_.data() + taken % ring_.size(), count);
      taken_.store(taken + count, std::memory_order_release);
      bytes = bytes.subspan(count);
    }
    return true;
  }

  void wait_until_taken() const {
    while (taken_.load(std::memory_order_acquire) != given_.load(std::memory_order_relaxed)) {
    }
  }

 private:
  static constexpr std::size_t step = std::size_t{64} << 10;
  static constexpr std::size_t cache_line = 64;

  /// From this place to the ring's end.
  [[nodiscard]] std::size_t contiguous(std::uint64_t place) const { return ring_.size() - place % ring_.size(); }

  std::vector<std::byte> ring_ = std::vector<std::byte>(std::size_t{1} << 20);
  alignas(cache_line) std::atomic<std::uint64_t> given_{0};
  alignas(cache_line) std::atomic<std::uint64_t> taken_{0};
};

class MemcpyInitiator final : public Initiator {
 public:
  MemcpyInitiator(const Setup& setup, bool hand_over)
      : map_(setup.map), destination_(setup.region), source_(map_.pages(), map_.page_size()), hand_over_(hand_over) {
    source_.fill_as_source();
    destination_.fill_as_destination();
  }

  void run(std::span<Stream> streams) override {
    if (!hand_over_) {
      run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
        const auto from = map_.initiator_pages(stream, batch);
        const auto to = map_.target_pages(stream, batch);
        for (std::size_t i = 0; i < from.size(); ++i) {
          std::memcpy(destination_.page(to[i]).data(), source_.page(from[i]).data(), map_.page_size());
        }
      });
      return;
    }
    HandOver way;
    const std::jthread taker(
        [&, stream = streams.front().id(), batch = streams.front().moved()](const std::stop_token& stopped) mutable {
          for (;; ++batch) {
            for (const std::uint64_t page : map_.target_pages(stream, batch)) {
              if (!way.take(destination_.page(page), stopped)) {
                return;
              }
            }
          }
        });
    run_blocking(streams, [&](std::size_t stream, std::uint64_t batch) {
      for (const std::uint64_t page : map_.initiator_pages(stream, batch)) {
        way.give(source_.page(page));
      }
      way.wait_until_taken();
    });
  }

 private:
  const PageMap& map_;
  const Region& destination_;
  Region source_;
  bool hand_over_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  std::size_t threads = 1;
  bool hand_over = false;
  Program program;
  program.name = "memcpy_bench";
  program.description = "Copies batches of pages from scattered places to scattered places in one process.";
  program.operations = {"write"};
  program.add_options = [&](CLI::App& app) {
    auto* const option = app.add_option("--threads", threads, "How many threads copy")
                             ->check(between(1, 256))
                             ->capture_default_str();
    app.add_flag(
           "--hand-over", hand_over,
           "Two threads, as bytes travel between processes: one copies to a buffer of 1 MiB, the other from there")
        ->excludes(option);
  };
  program.configure = [&](Job& job) {
    job.variant = hand_over ? "memcpy, handed over" : "memcpy";
    job.threads = threads;
    job.streams_per_peer = threads;
  };
  program.make_initiator = [&](const Setup& setup, const Json&) {
    return std::make_unique<MemcpyInitiator>(setup, hand_over);
  };
  return run_program(program, argc, argv);
}
