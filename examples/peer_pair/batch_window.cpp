// SPDX-License-Identifier: Apache-2.0
#include "batch_window.hpp"

#include <fmt/core.h>

#include <algorithm>

#include "exit_code.hpp"

namespace example {

BatchWindow::BatchWindow(std::string peer_id, const CacheBatches& batches, Limits limits, const Supervisor& supervisor,
                         Landed landed)
    : peer_id_(std::move(peer_id)),
      batches_(batches),
      limits_(limits),
      supervisor_(supervisor),
      landed_(std::move(landed)) {}

void BatchWindow::make_room() {
  while (in_flight_.size() >= limits_.depth) {
    finish_oldest();
  }
}

void BatchWindow::wait_turn(std::uint64_t bytes) {
  if (limits_.bytes_per_second == 0) {
    return;
  }
  supervisor_.wait_until(next_turn_);
  const std::chrono::duration<double> time(static_cast<double>(bytes) / static_cast<double>(limits_.bytes_per_second));
  next_turn_ = std::max(next_turn_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(time);
}

void BatchWindow::finish_oldest() {
  const auto transfer = in_flight_.front();
  in_flight_.pop_front();
  if (const std::error_code ec = transfer->ended.get_future().get()) {
    throw Failure(ExitCode::transfer_failed,
                  fmt::format("batch {} of {} failed: {}", finished_ + 1, batches_.count(),
                              transfer->diagnostic.empty() ? ec.message() : transfer->diagnostic));
  }
  landed_(std::exchange(finished_, finished_ + 1));
}

}  // namespace example
