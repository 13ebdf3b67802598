// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_THREAD_RANK_HPP
#define KVFERRY_KIT_THREAD_RANK_HPP

#include <sched.h>
#include <sys/resource.h>

#include <atomic>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// How soon the system runs a thread that is ready, beside others: by its policy, and its priority or nice value. What cgroups and
/// sessions have of the CPU isn't seen. Greater: sooner.
class ThreadRank {
 public:
  /// The calling thread's: two system calls.
  [[nodiscard]] static int now() noexcept { return last_seen(1); }
  /// The same for those who ask with each call or event. The system is asked each 1,024th time.
  [[nodiscard]] static int lately() noexcept { return last_seen(1024); }

  /// @param policy of the system.
  /// @param priority of a thread that has one beside all nice values; of 1 to 99.
  [[nodiscard]] static constexpr int of(int policy, int priority, int nice) noexcept {
    constexpr int beside_all_nice_values = 100;
    constexpr int deadline_policy = 6;  // SCHED_DEADLINE, which not each C library names
    switch (policy) {
      case deadline_policy: return 3 * beside_all_nice_values;
      case SCHED_FIFO:
      case SCHED_RR: return beside_all_nice_values + priority;
      case SCHED_IDLE: return -beside_all_nice_values;
      default: return -nice;
    }
  }

 private:
  [[nodiscard]] static int of_this_thread() noexcept {
    const int scheduler = ::sched_getscheduler(0);
    const int policy = scheduler < 0 ? SCHED_OTHER : scheduler & ~SCHED_RESET_ON_FORK;
    if (policy == SCHED_FIFO || policy == SCHED_RR) {
      sched_param param{};
      (void)::sched_getparam(0, &param);
      return of(policy, param.sched_priority, 0);
    }
    return of(policy, 0, ::getpriority(PRIO_PROCESS, 0));  // Linux: of the thread
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
};

/// The rank of the threads that serve a channel's links where no blocking call does: of the one that did so last. A thread that lends
/// itself to a link has everybody's answers wait for it, so one that runs later than these had better not.
class IoThreadRank {
 public:
  /// Until one of them has served, they are taken to be as the thread that makes this: a channel's own threads are, unless the
  /// system resets what is made by it (SCHED_RESET_ON_FORK).
  IoThreadRank() noexcept : rank_(ThreadRank::now()) {}

  /// By a thread that the executor lends, when it serves a link. So the process may be given another priority: whoever is below
  /// the old one has these threads serve, which then notice.
  void note_this_thread() noexcept {
    if (const int rank = ThreadRank::lately(); rank_.load(std::memory_order_relaxed) != rank) {
      rank_.store(rank, std::memory_order_relaxed);
    }
  }

  [[nodiscard]] bool is_above_this_thread_now() const noexcept {
    return ThreadRank::now() < rank_.load(std::memory_order_relaxed);
  }
  /// See `ThreadRank::lately`.
  [[nodiscard]] bool was_above_this_thread_lately() const noexcept {
    return ThreadRank::lately() < rank_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<int> rank_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_THREAD_RANK_HPP
