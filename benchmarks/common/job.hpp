// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace bench {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::json;

/// A job: the bytes that are moved, and how; one line of the results. The initiator sends it to the target, so it holds all
/// that both have to agree on.
struct Job {
  std::string variant;  ///< How the program did it, for the results: "tcp", "polling", ...
  std::string operation = "write";
  std::size_t page = 0;   ///< Bytes.
  std::size_t batch = 0;  ///< Pages.
  std::size_t depth = 1;  ///< Batches in flight, for each thread and peer.
  std::size_t threads = 1;
  std::size_t peers = 1;
  /// Each stream moves one batch after the other, in pages of its own.
  std::size_t streams_per_peer = 1;
  std::uint64_t region = 0;      ///< Bytes on each side, at least; rounded to whole batches.
  double seconds = 0;            ///< How long the timed part takes,
  std::uint64_t iterations = 0;  ///< or how many batches each stream moves in it, if this is not 0.
  double warm_up = 0;            ///< Seconds before that.
  unsigned timeout = 0;          ///< Seconds after which a run that hangs is ended.
  bool count_syscalls = false;   ///< Which makes each of them a little slower.
  bool adjacent = false;         ///< Pages in order on both sides, not at random.
  bool corrupt = false;          ///< Fault injection: changes a byte of what arrived, so that the verification fails.
  Json settings;                 ///< The program's own options.

  /// Whether the pages come from the target.
  [[nodiscard]] bool target_is_source() const { return operation == "read"; }
  [[nodiscard]] std::size_t streams() const { return peers * streams_per_peer; }
  [[nodiscard]] std::uint64_t batch_bytes() const { return std::uint64_t{page} * batch; }
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Job, variant, operation, page, batch, depth, threads, peers, streams_per_peer,
                                   region, seconds, iterations, warm_up, timeout, count_syscalls, adjacent, corrupt,
                                   settings)

}  // namespace bench
