// SPDX-License-Identifier: Apache-2.0
#include "scheduler.hpp"

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>

#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::schedules {
namespace {

thread_local Scheduler* scheduler = nullptr;
thread_local Scheduler::Thread* own = nullptr;

void wait(sem_t& semaphore) {
  while (::sem_wait(&semaphore) != 0) {  // a signal
  }
}

/// Threads that take turns, those made by this one among them, hand over faster than to another core, which may be asleep.
void stay_on_this_core() {
  cpu_set_t here;
  CPU_ZERO(&here);
  CPU_SET(static_cast<std::size_t>(std::max(::sched_getcpu(), 0)), &here);
  (void)::pthread_setaffinity_np(::pthread_self(), sizeof(here), &here);
}

}  // namespace

Scheduler::Scheduler(std::uint64_t seed, const Habits& habits) : seed_(seed), habits_(habits), random_(seed) {
  if (const auto* const test = ::testing::UnitTest::GetInstance()->current_test_info()) {
    test_ = std::string(test->test_suite_name()) + "." + test->name();
  }
  // Some rounds are restless, some have long turns.
  constexpr std::array<std::uint64_t, 5> switches{2, 3, 6, 16, 48};
  switch_one_in_ = switches[dice(switches.size())];
  jump_one_in_ = habits.time_jumps.at(dice(habits.time_jumps.size()));
  short_one_in_ = habits.short_transfers.at(dice(habits.short_transfers.size()));
  ::sem_init(&over_, 0, 0);
}

Scheduler* Scheduler::current() noexcept { return scheduler; }

Outcome Scheduler::run(const std::function<void()>& body) {
  reset_connections();
  reset_handshakes();
  Thread& first = add();
  ::sem_post(&first.turn);
  std::thread thread([&] {
    stay_on_this_core();
    begin(first);
    body();
    end();
  });
  wait(over_);
  thread.join();
  for (const auto& each : threads_) {
    ::sem_destroy(&each->turn);
  }
  return {steps_, trace_, now_ - std::chrono::hours(1000)};
}

Scheduler::Thread& Scheduler::add() {
  // Some are slow for the whole of a round.
  constexpr std::array<std::size_t, 4> weights{1, 8, 8, 64};
  auto& thread = threads_.emplace_back(std::make_unique<Thread>());
  thread->number = threads_.size() - 1;
  thread->weight = weights[dice(weights.size())];
  ::sem_init(&thread->turn, 0, 0);
  return *thread;
}

void Scheduler::begin(Thread& thread) {
  wait(thread.turn);
  thread.handle = ::pthread_self();
  scheduler = this;
  own = &thread;
}

void Scheduler::end() {
  Thread& self = *own;
  own = nullptr;
  scheduler = nullptr;
  self.state = Thread::State::ended;
  self.doing = "has ended";
  wake_all(&self);
  ++steps_;
  if (std::ranges::all_of(threads_, [](const auto& each) { return each->state == Thread::State::ended; })) {
    ::sem_post(&over_);
  } else {
    ::sem_post(&choose().turn);
  }
}

Scheduler::Thread* Scheduler::find(pthread_t handle) {
  const auto it = std::ranges::find_if(threads_, [&](const auto& each) {
    return each->state != Thread::State::ended && ::pthread_equal(each->handle, handle) != 0;
  });
  return it == threads_.end() ? nullptr : it->get();
}

void Scheduler::point(const char* doing) {
  if (kept_ != 0) {
    return;
  }
  Thread& self = *own;
  self.doing = doing;
  if (++steps_ > habits_.step_limit) {
    give_up("they go round and round");
  }
  if (jump_one_in_ != 0 && dice(jump_one_in_) == 0) {
    if (const auto next = next_time(); next && *next < now_ + std::chrono::seconds(3)) {
      now_ = std::max(now_, *next);
    }
  }
  if (dice(switch_one_in_) == 0) {
    hand_over(self);
  }
}

bool Scheduler::wait_for(const void* what, const char* doing, std::optional<Nanoseconds> until) {
  Thread& self = *own;
  ++steps_;
  self.state = Thread::State::waiting;
  self.waits_for = what;
  self.doing = doing;
  self.until = until;
  self.timed_out = false;
  hand_over(self);
  return !std::exchange(self.timed_out, false);
}

bool Scheduler::look_later(const char* doing, std::optional<Nanoseconds> until) {
  Thread& self = *own;
  self.state = Thread::State::looking;
  self.doing = doing;
  self.until = until;
  self.looked_at = steps_;
  self.timed_out = false;
  hand_over(self);
  return !std::exchange(self.timed_out, false);
}

void Scheduler::wake_all(const void* what) {
  for (const auto& each : threads_) {
    if (each->state == Thread::State::waiting && each->waits_for == what) {
      each->state = Thread::State::ready;
    }
  }
}

void Scheduler::wake_one(const void* what) {
  std::vector<Thread*> waiting;
  for (const auto& each : threads_) {
    if (each->state == Thread::State::waiting && each->waits_for == what) {
      waiting.push_back(each.get());
    }
  }
  if (!waiting.empty()) {
    waiting[dice(waiting.size())]->state = Thread::State::ready;
  }
}

void Scheduler::hand_over(Thread& self) {
  Thread& next = choose();
  if (&next != &self) {
    ::sem_post(&next.turn);
    wait(self.turn);
  }
  self.until.reset();
  self.waits_for = nullptr;
}

Scheduler::Thread& Scheduler::choose() {
  for (;;) {
    std::size_t weight = 0;
    std::vector<Thread*> able;
    for (const auto& each : threads_) {
      const bool waits = each->state == Thread::State::waiting || each->state == Thread::State::looking;
      const bool on_time = waits && each->until && *each->until <= now_;
      if (each->state == Thread::State::ready || on_time ||
          (each->state == Thread::State::looking && each->looked_at != steps_)) {
        able.push_back(each.get());
        weight += each->weight;
      }
    }
    if (!able.empty()) {
      std::uint64_t at = dice(weight);
      const auto chosen = std::ranges::find_if(able, [&](const Thread* each) {
        const bool found = at < each->weight;
        at -= found ? 0 : each->weight;
        return found;
      });
      Thread& next = **chosen;
      if (next.state != Thread::State::ready) {
        next.timed_out = next.until && *next.until <= now_;
        next.state = Thread::State::ready;
      }
      trace_ = (trace_ ^ (next.number + 1) ^ (steps_ << 8)) * 0x100000001b3;
      return next;
    }
    const auto next = next_time();
    if (!next) {
      give_up("each waits for another");
    }
    now_ = std::max(now_, *next);
    if (now_ > std::chrono::hours(1000) + habits_.time_limit) {
      give_up("they wait for times to come, and nothing else happens");
    }
  }
}

std::optional<Nanoseconds> Scheduler::next_time() const {
  std::optional<Nanoseconds> next;
  for (const auto& each : threads_) {
    if (each->state != Thread::State::ended && each->until) {
      next = std::min(next.value_or(*each->until), *each->until);
    }
  }
  return next;
}

void Scheduler::give_up(const char* why) {
  scheduler = nullptr;
  std::fprintf(stderr, "[ SCHEDULE ] %s: %s. KVFERRY_SCHEDULE_SEED=%llu, step %llu, %lld us have passed\n",
               test_.c_str(), why, static_cast<unsigned long long>(seed_), static_cast<unsigned long long>(steps_),
               static_cast<long long>((now_ - std::chrono::hours(1000)).count() / 1000));
  for (const auto& each : threads_) {
    if (each->state != Thread::State::ended) {
      std::array<char, 16> name{};
      (void)::pthread_getname_np(each->handle, name.data(), name.size());
      std::fprintf(stderr, "[ SCHEDULE ] thread %zu (%s): %s\n", each->number, name.data(), each->doing);
    }
  }
  std::_Exit(EXIT_FAILURE);  // the threads can't be ended, and stand in the middle of something
}

bool all_is_seen() {
  return !testing::sanitized && std::getenv("KVFERRY_SCHEDULE_SEED") == nullptr &&
         std::getenv("KVFERRY_SCHEDULE_ROUNDS") == nullptr;
}

void explore(std::uint64_t rounds, const std::function<void()>& body, const Habits& habits) {
  const auto number = [](const char* name) -> std::optional<std::uint64_t> {
    const char* const text = std::getenv(name);
    return text == nullptr ? std::nullopt : std::optional<std::uint64_t>(std::strtoull(text, nullptr, 10));
  };
  const auto only = number("KVFERRY_SCHEDULE_SEED");
  const std::uint64_t first = only.value_or(1);
  // A sanitizer takes ten times as long, above all to make threads.
  const std::uint64_t usual = testing::sanitized ? std::max(rounds / 5, std::min<std::uint64_t>(rounds, 100)) : rounds;
  const std::uint64_t last = only.value_or(number("KVFERRY_SCHEDULE_ROUNDS").value_or(usual));
  for (std::uint64_t seed = first; seed <= last; ++seed) {
    const Outcome outcome = Scheduler(seed, habits).run(body);
    if (::testing::Test::HasFailure()) {
      ADD_FAILURE() << "in the round of KVFERRY_SCHEDULE_SEED=" << seed << ", which took " << outcome.steps << " steps";
      return;
    }
    if (only) {
      std::printf("[ SCHEDULE ] seed %llu: %llu steps, trace %016llx, %lld us\n", static_cast<unsigned long long>(seed),
                  static_cast<unsigned long long>(outcome.steps), static_cast<unsigned long long>(outcome.trace),
                  static_cast<long long>(outcome.passed.count() / 1000));
    }
  }
}

}  // namespace kvferry::schedules
