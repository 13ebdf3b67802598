// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/transfer_spec.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "cache_batches.hpp"
#include "supervisor.hpp"

namespace example {

/// Transfers a cache batch by batch, with several asynchronous batches in flight: while one is on the wire the next are
/// already waiting for it.
class BatchWindow {
 public:
  struct Limits {
    std::size_t depth = 1;                ///< Batches in flight at a time.
    std::chrono::milliseconds timeout{};  ///< For each of them.
    std::uint64_t bytes_per_second = 0;   ///< 0: as fast as it goes.
  };

  using Landed = std::function<void(std::size_t batch)>;

  /// @param landed called for each batch that was transferred, in order, inside `run`.
  BatchWindow(std::string peer_id, const CacheBatches& batches, Limits limits, const Supervisor& supervisor,
              Landed landed);

  /// Calls `start(batch, spec, handler)` for each batch: it completes the spec, and starts the transfer with it and
  /// with the handler as completion token. Returns when all have been transferred. @throws Failure if one was not.
  template <class Start>
  void run(Start start) {
    for (std::size_t batch = 0; batch < batches_.count(); ++batch) {
      make_room();
      wait_turn(batches_.bytes(batch));
      auto transfer = std::make_shared<Transfer>();
      kvferry::TransferSpec spec;
      spec.peer_id = peer_id_;
      spec.timeout = limits_.timeout;
      spec.diagnostic = &transfer->diagnostic;
      // The handler owns the transfer, too: its diagnostic may be written until then, even if this window is gone.
      start(batch, spec, [transfer](std::error_code ec, std::size_t) { transfer->ended.set_value(ec); });
      in_flight_.push_back(std::move(transfer));
    }
    while (!in_flight_.empty()) {
      finish_oldest();
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  struct Transfer {
    std::promise<std::error_code> ended;
    std::string diagnostic;
  };

  void make_room();
  void wait_turn(std::uint64_t bytes);
  void finish_oldest();

  std::string peer_id_;
  const CacheBatches& batches_;
  Limits limits_;
  const Supervisor& supervisor_;
  Landed landed_;
  std::deque<std::shared_ptr<Transfer>> in_flight_;
  std::size_t finished_ = 0;
  Clock::time_point next_turn_ = Clock::now();
};

}  // namespace example
