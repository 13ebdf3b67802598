// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "job.hpp"

namespace bench {

/// The resources that this process has used since it started.
struct Usage {
  double user_seconds = 0;
  double system_seconds = 0;
  /// Nothing unless they are counted, see `count_syscalls`.
  std::optional<std::uint64_t> syscalls;

  [[nodiscard]] double cpu_seconds() const { return user_seconds + system_seconds; }
};

[[nodiscard]] Usage operator-(const Usage& later, const Usage& earlier);

void to_json(Json& json, const Usage& usage);
void from_json(const Json& json, Usage& usage);

/// Starts to count the system calls of this thread and of all that it starts from now on: call it before there are
/// threads. @throws std::system_error without a mounted tracefs, or without the right to use it (root, or CAP_PERFMON).
void count_syscalls();

[[nodiscard]] Usage current_usage();

}  // namespace bench
