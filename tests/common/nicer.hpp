// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>
#include <sys/resource.h>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// Whether `be_nicer` makes a difference to the calling thread. None needs rights.
[[nodiscard]] inline bool may_be_nicer() {
  const int scheduler = ::sched_getscheduler(0);
  const int policy = scheduler < 0 ? SCHED_OTHER : scheduler & ~SCHED_RESET_ON_FORK;
  return (policy == SCHED_OTHER || policy == SCHED_BATCH) && ::getpriority(PRIO_PROCESS, 0) < 19;
}

/// The calling thread, and those that it makes from here on, run after others by one nice value.
[[nodiscard]] inline bool be_nicer() { return ::setpriority(PRIO_PROCESS, 0, ::getpriority(PRIO_PROCESS, 0) + 1) == 0; }

}  // namespace kvferry::test
