// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>
#include <semaphore.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::schedules {

using Nanoseconds = std::chrono::nanoseconds;

/// Once in how many steps something happens, at the choice of each round's dice; 0: never.
using OneIn = std::array<std::uint64_t, 4>;

/// How a round differs from what an idle machine would do.
struct Habits {
  /// The clock goes to the next time that a thread waits for, though there is other work.
  OneIn time_jumps{0, 0, 300, 2000};
  /// Sockets take or give less than they could, or nothing for now.
  OneIn short_transfers{0, 0, 4, 16};
  std::uint64_t step_limit = 3'000'000;
  Nanoseconds time_limit = std::chrono::hours(10);
};

/// Time passes only while nobody has anything to do: what ends late then was late by itself.
inline constexpr Habits steady_time{.time_jumps = {}};
/// Deadlines are all around.
inline constexpr Habits leaping_time{.time_jumps = {4, 15, 60, 250}};

/// The outcome of a round.
struct Outcome {
  std::uint64_t steps = 0;
  std::uint64_t trace = 0;  ///< The same for rounds in which the same threads took the same turns.
  Nanoseconds passed{0};
};

/// Runs threads one at a time, in turns that a seed decides, on a clock of their own.
///
/// A thread may lose its turn wherever it takes or releases a lock, waits, notifies, starts or joins a thread, or calls the
/// system for a socket. The clock goes on by a microsecond each time that it is read; when all threads wait, it goes to
/// what the first of them waits for.
class Scheduler {
 public:
  Scheduler(std::uint64_t seed, const Habits& habits);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// Runs `body`, as the first thread, until it and all threads that were started have ended. Ends the process, with a
  /// word of each thread, if they never do.
  Outcome run(const std::function<void()>& body);

  /// One of the threads.
  struct Thread {
    enum class State { ready, waiting, looking, ended };

    std::size_t number = 0;
    std::size_t weight = 1;
    pthread_t handle{};
    sem_t turn{};
    State state = State::ready;
    const void* waits_for = nullptr;
    const char* doing = "starts";
    std::optional<Nanoseconds> until;
    bool timed_out = false;
    std::uint64_t looked_at = 0;  ///< The step of the others' after which it found nothing.
  };

  /// The scheduler of the calling thread; null if it is not one of the threads.
  [[nodiscard]] static Scheduler* current() noexcept;

  /// @name For what stands in for the system (`system_*.cpp`); by the thread whose turn it is
  /// @{

  /// Another thread may have its turn here.
  void point(const char* doing);
  /// Until somebody wakes `what`, or the time.
  /// @return false: the time.
  bool wait_for(const void* what, const char* doing, std::optional<Nanoseconds> until = std::nullopt);
  /// Until others have done something that may have changed what was looked at.
  /// @return false: the time has come.
  bool look_later(const char* doing, std::optional<Nanoseconds> until);
  void wake_all(const void* what);
  void wake_one(const void* what);

  /// Registers a thread that is about to be made.
  [[nodiscard]] Thread& add();
  /// By a thread that was just made, before anything else, and after everything else.
  void begin(Thread& thread);
  void end();
  /// @return null if it is none of these.
  [[nodiscard]] Thread* find(pthread_t handle);

  /// Nobody else has a turn until this has been called as often with false.
  void keep_turn(bool keep) noexcept { kept_ = keep ? kept_ + 1 : kept_ - 1; }

  [[nodiscard]] Nanoseconds now() const noexcept { return now_; }
  [[nodiscard]] Nanoseconds read_clock() noexcept { return now_ += std::chrono::microseconds(1); }
  /// A number below `sides`.
  [[nodiscard]] std::uint64_t dice(std::uint64_t sides) { return random_() % sides; }
  /// Whether a transfer is to be cut short this time.
  [[nodiscard]] bool cut_short() { return short_one_in_ != 0 && dice(short_one_in_) == 0; }
  /// @}

 private:
  void hand_over(Thread& self);
  [[nodiscard]] Thread& choose();
  [[nodiscard]] std::optional<Nanoseconds> next_time() const;
  [[noreturn]] void give_up(const char* why);

  const std::uint64_t seed_;
  const Habits habits_;
  std::string test_;
  std::mt19937_64 random_;
  std::uint64_t switch_one_in_;
  std::uint64_t jump_one_in_ = 0;
  std::uint64_t short_one_in_ = 0;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::uint64_t steps_ = 0;
  std::uint64_t trace_ = 0xcbf29ce484222325;
  Nanoseconds now_ = std::chrono::hours(1000);
  int kept_ = 0;
  sem_t over_{};
};

/// Puts the system's stand-ins into the state in which each round begins.
void reset_connections();
void reset_handshakes();

/// Whether `explore` runs as many rounds as the test says, so that the test may expect to have seen each outcome.
[[nodiscard]] bool all_is_seen();

/// Runs `body` with each seed from 1 to `rounds`, a fifth of them under a sanitizer, until a check fails, and then says how
/// to run that round again:
/// `KVFERRY_SCHEDULE_SEED` runs one seed alone, `KVFERRY_SCHEDULE_ROUNDS` another number of them.
void explore(std::uint64_t rounds, const std::function<void()>& body, const Habits& habits = {});

}  // namespace kvferry::schedules
