// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_THREAD_RANK_HPP
#define KVFERRY_KIT_THREAD_RANK_HPP

#include <sched.h>
#include <sys/resource.h>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// How soon the system runs a thread that is ready, beside others: by its policy and its nice value. A thread that lends itself to
/// a link has everybody's answers wait for it. One that runs later than those that would do the work otherwise had better
/// not.
class ThreadRank {
 public:
  /// The calling thread's. Those that it makes from here on have the same.
  ThreadRank() noexcept : rank_(of_this_thread()) {}

  [[nodiscard]] bool is_above_this_thread() const noexcept { return last_seen(1) < rank_; }
  /// The same for those who ask with each call: two system calls in a thousand calls.
  [[nodiscard]] bool was_above_this_thread() const noexcept { return last_seen(1024) < rank_; }

 private:
  [[nodiscard]] static int of_this_thread() noexcept {
    constexpr int beside_all_others = 100;
    switch (::sched_getscheduler(0) & ~SCHED_RESET_ON_FORK) {
      case SCHED_FIFO:
      case SCHED_RR: return beside_all_others;
      case SCHED_IDLE: return -beside_all_others;
      default: return -::getpriority(PRIO_PROCESS, 0);  // Linux: of the thread
    }
  }
  /// @param most how often what has been seen is believed.
  [[nodiscard]] static int last_seen(unsigned most) noexcept {
    struct Seen {
      int rank = 0;
      unsigned times = 0;
    };
    thread_local constinit Seen seen;
    if (seen.times == 0 || seen.times >= most) {
      seen = {of_this_thread(), 0};
    }
    ++seen.times;
    return seen.rank;
  }

  int rank_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_THREAD_RANK_HPP
