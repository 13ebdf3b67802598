// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "job.hpp"

namespace bench {

/// When a run ends: at a time, or after so many batches of each stream.
struct Limit {
  Clock::time_point deadline = Clock::time_point::max();
  std::uint64_t batches = UINT64_MAX;
};

/// One line of batches: says whether another is to be moved, and notes how long each took. Used by one thread at a time.
class Stream {
 public:
  explicit Stream(std::size_t id) : id_(id) {}

  [[nodiscard]] std::size_t id() const { return id_; }
  /// How many batches it has moved in all its runs.
  [[nodiscard]] std::uint64_t moved() const { return next_; }

  void begin_run(const Limit& limit);

  /// The number of the next batch, counted from the first run on; nothing once the limit is reached. Each that was
  /// given out has to be moved.
  [[nodiscard]] std::optional<std::uint64_t> next(Clock::time_point now) {
    if (now >= limit_.deadline || latencies_.size() + in_flight_ >= limit_.batches) {
      return std::nullopt;
    }
    ++in_flight_;
    return next_++;
  }

  void completed(Clock::time_point started, Clock::time_point now) {
    --in_flight_;
    latencies_.push_back(static_cast<std::uint64_t>((now - started).count()));
    ended_ = now;
  }
  /// How long the call took that started a batch and did not wait for it.
  void submitted(Clock::duration took) { submissions_.push_back(static_cast<std::uint64_t>(took.count())); }

  /// Of the last run; nanoseconds.
  [[nodiscard]] const std::vector<std::uint64_t>& latencies() const { return latencies_; }
  [[nodiscard]] const std::vector<std::uint64_t>& submissions() const { return submissions_; }
  [[nodiscard]] Clock::time_point ended() const { return ended_; }

 private:
  std::size_t id_;
  std::uint64_t next_ = 0;
  std::uint64_t in_flight_ = 0;
  Limit limit_;
  std::vector<std::uint64_t> latencies_;
  std::vector<std::uint64_t> submissions_;
  Clock::time_point ended_;
};

/// Runs `work(i)` for each i below `count` at the same time, one of them on the calling thread. When all have ended, throws
/// what one of them threw.
template <class Work>
void run_in_threads(std::size_t count, Work work) {
  std::vector<std::exception_ptr> failures(count);
  const auto guarded = [&](std::size_t i) {
    try {
      work(i);
    } catch (...) {
      failures[i] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 1; i < count; ++i) {
      threads.emplace_back(guarded, i);
    }
    guarded(0);
  }
  for (const auto& failure : failures) {
    if (failure) {
      std::rethrow_exception(failure);
    }
  }
}

/// Each stream on a thread of its own: `move(stream id, batch)` returns when the batch is where it belongs.
template <class Move>
void run_blocking(std::span<Stream> streams, Move move) {
  run_in_threads(streams.size(), [&](std::size_t i) {
    auto started = Clock::now();
    while (const auto batch = streams[i].next(started)) {
      move(streams[i].id(), *batch);
      const auto now = Clock::now();
      streams[i].completed(started, now);
      started = now;
    }
  });
}

}  // namespace bench
