// SPDX-License-Identifier: Apache-2.0
// Locks, conditions and threads of those that a Scheduler runs. The linker puts these in the place of the system's
// functions of that name (`--wrap`), in the library as well; other threads get the system's.
#include <pthread.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <ctime>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "scheduler.hpp"

namespace {

using kvferry::schedules::Scheduler;
using std::chrono::nanoseconds;

/// Where a thread of the scheduler's begins.
struct Beginning {
  Scheduler& scheduler;
  Scheduler::Thread& thread;
  void* (*body)(void*);
  void* argument;
};

void* begin(void* given) {
  const std::unique_ptr<Beginning> beginning(static_cast<Beginning*>(given));
  beginning->scheduler.begin(beginning->thread);
  void* const result = beginning->body(beginning->argument);
  beginning->scheduler.end();
  return result;
}

/// Likewise of a `std::thread`.
struct ScheduledState final : std::thread::_State {
  ScheduledState(Scheduler& by, std::unique_ptr<std::thread::_State> body)
      : scheduler(by), thread(by.add()), inner(std::move(body)) {}
  void _M_run() override {
    scheduler.begin(thread);
    inner->_M_run();
    inner.reset();
    scheduler.end();
  }
  Scheduler& scheduler;
  Scheduler::Thread& thread;
  std::unique_ptr<std::thread::_State> inner;
};

void join(Scheduler& scheduler, pthread_t handle) {
  if (Scheduler::Thread* const thread = scheduler.find(handle)) {
    (void)scheduler.wait_for(thread, "joins a thread");
  }
}

}  // namespace

extern "C" {

int __real_pthread_mutex_lock(pthread_mutex_t* mutex);
int __real_pthread_mutex_trylock(pthread_mutex_t* mutex);
int __real_pthread_mutex_unlock(pthread_mutex_t* mutex);
int __real_pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex);
int __real_pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const timespec* until);
int __real_pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                                  const timespec* until);
int __real_pthread_cond_signal(pthread_cond_t* condition);
int __real_pthread_cond_broadcast(pthread_cond_t* condition);
int __real_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument);
int __real_pthread_join(pthread_t thread, void** result);
int __real_pthread_once(pthread_once_t* once, void (*body)());
int __real_sched_yield();
int __real___cxa_guard_acquire(std::int64_t* guard);
void __real___cxa_guard_release(std::int64_t* guard);
void __real___cxa_guard_abort(std::int64_t* guard);
void __real__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(std::condition_variable* condition,
                                                                      std::unique_lock<std::mutex>& lock);
void __real__ZNSt18condition_variable10notify_oneEv(std::condition_variable* condition);
void __real__ZNSt18condition_variable10notify_allEv(std::condition_variable* condition);
void __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread* thread, std::unique_ptr<std::thread::_State> state, void (*depends)());
void __real__ZNSt6thread4joinEv(std::thread* thread);

int __wrap_pthread_mutex_lock(pthread_mutex_t* mutex) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_mutex_lock(mutex);
  }
  scheduler->point("takes a lock");
  for (;;) {
    const int result = __real_pthread_mutex_trylock(mutex);
    if (result != EBUSY) {
      return result;
    }
    (void)scheduler->wait_for(mutex, "waits for a lock");
  }
}

int __wrap_pthread_mutex_trylock(pthread_mutex_t* mutex) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    scheduler->point("tries a lock");
  }
  return __real_pthread_mutex_trylock(mutex);
}

int __wrap_pthread_mutex_unlock(pthread_mutex_t* mutex) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_mutex_unlock(mutex);
  }
  scheduler->wake_all(mutex);
  const int result = __real_pthread_mutex_unlock(mutex);
  scheduler->point("has released a lock");
  return result;
}

static int wait_for_condition(Scheduler& scheduler, const pthread_cond_t* condition, pthread_mutex_t* mutex,
                              std::optional<nanoseconds> until) {
  scheduler.wake_all(mutex);
  (void)__real_pthread_mutex_unlock(mutex);
  const bool notified = scheduler.wait_for(condition, "waits for a condition", until);
  while (__real_pthread_mutex_trylock(mutex) == EBUSY) {
    (void)scheduler.wait_for(mutex, "waits for a lock");
  }
  return notified ? 0 : ETIMEDOUT;
}

int __wrap_pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex) {
  Scheduler* const scheduler = Scheduler::current();
  return scheduler == nullptr ? __real_pthread_cond_wait(condition, mutex)
                              : wait_for_condition(*scheduler, condition, mutex, std::nullopt);
}

// Callers that give a deadline have read the scheduler's clock.
int __wrap_pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const timespec* until) {
  Scheduler* const scheduler = Scheduler::current();
  return scheduler == nullptr ? __real_pthread_cond_timedwait(condition, mutex, until)
                              : wait_for_condition(*scheduler, condition, mutex,
                                                   std::chrono::seconds(until->tv_sec) + nanoseconds(until->tv_nsec));
}

int __wrap_pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                                  const timespec* until) {
  Scheduler* const scheduler = Scheduler::current();
  return scheduler == nullptr ? __real_pthread_cond_clockwait(condition, mutex, clock, until)
                              : wait_for_condition(*scheduler, condition, mutex,
                                                   std::chrono::seconds(until->tv_sec) + nanoseconds(until->tv_nsec));
}

int __wrap_pthread_cond_signal(pthread_cond_t* condition) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_cond_signal(condition);
  }
  scheduler->wake_one(condition);
  scheduler->point("has notified one");
  return 0;
}

int __wrap_pthread_cond_broadcast(pthread_cond_t* condition) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_cond_broadcast(condition);
  }
  scheduler->wake_all(condition);
  scheduler->point("has notified all");
  return 0;
}

int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_create(thread, attributes, body, argument);
  }
  auto beginning = std::make_unique<Beginning>(Beginning{*scheduler, scheduler->add(), body, argument});
  Scheduler::Thread& made = beginning->thread;
  const int result = __real_pthread_create(thread, attributes, begin, beginning.get());
  if (result == 0) {
    (void)beginning.release();
    made.handle = *thread;
  } else {
    made.state = Scheduler::Thread::State::ended;
  }
  scheduler->point("has started a thread");
  return result;
}

int __wrap_pthread_join(pthread_t thread, void** result) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    join(*scheduler, thread);
  }
  return __real_pthread_join(thread, result);
}

int __wrap_pthread_once(pthread_once_t* once, void (*body)()) {
  static std::set<const pthread_once_t*> begun;  // by threads that have their turn in the middle of it
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_pthread_once(once, body);
  }
  scheduler->point("comes to what is done once");
  while (begun.count(once) != 0) {
    (void)scheduler->wait_for(once, "waits for what another does once");
  }
  struct Under {
    Under(Scheduler& by, const pthread_once_t* what) : scheduler(by), once(what) { begun.insert(once); }
    Under(const Under&) = delete;
    Under& operator=(const Under&) = delete;
    ~Under() {
      begun.erase(once);
      scheduler.wake_all(once);
    }
    Scheduler& scheduler;
    const pthread_once_t* once;
  } const under(*scheduler, once);
  return __real_pthread_once(once, body);
}

int __wrap_sched_yield() {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    return __real_sched_yield();
  }
  scheduler->point("lets others run");
  return 0;
}

// The system's lock of an object that is made at its first use can't be seen.
int __wrap___cxa_guard_acquire(std::int64_t* guard) {
  const int mine = __real___cxa_guard_acquire(guard);
  if (Scheduler* const scheduler = mine != 0 ? Scheduler::current() : nullptr) {
    scheduler->keep_turn(true);
  }
  return mine;
}

void __wrap___cxa_guard_release(std::int64_t* guard) {
  __real___cxa_guard_release(guard);
  if (Scheduler* const scheduler = Scheduler::current()) {
    scheduler->keep_turn(false);
  }
}

void __wrap___cxa_guard_abort(std::int64_t* guard) {
  __real___cxa_guard_abort(guard);
  if (Scheduler* const scheduler = Scheduler::current()) {
    scheduler->keep_turn(false);
  }
}

// Functions that the C++ library has in its own file, where the linker replaces nothing.

void __wrap__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(std::condition_variable* condition,
                                                                      std::unique_lock<std::mutex>& lock) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    (void)wait_for_condition(*scheduler, condition->native_handle(), lock.mutex()->native_handle(), std::nullopt);
  } else {
    __real__ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE(condition, lock);
  }
}

void __wrap__ZNSt18condition_variable10notify_oneEv(std::condition_variable* condition) {
  if (Scheduler::current() != nullptr) {
    (void)__wrap_pthread_cond_signal(condition->native_handle());
  } else {
    __real__ZNSt18condition_variable10notify_oneEv(condition);
  }
}

void __wrap__ZNSt18condition_variable10notify_allEv(std::condition_variable* condition) {
  if (Scheduler::current() != nullptr) {
    (void)__wrap_pthread_cond_broadcast(condition->native_handle());
  } else {
    __real__ZNSt18condition_variable10notify_allEv(condition);
  }
}

void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread* thread, std::unique_ptr<std::thread::_State> state, void (*depends)()) {
  Scheduler* const scheduler = Scheduler::current();
  if (scheduler == nullptr) {
    __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
        thread, std::move(state), depends);
    return;
  }
  auto scheduled = std::make_unique<ScheduledState>(*scheduler, std::move(state));
  Scheduler::Thread& made = scheduled->thread;
  try {
    __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
        thread, std::move(scheduled), depends);
  } catch (...) {
    made.state = Scheduler::Thread::State::ended;
    throw;
  }
  made.handle = thread->native_handle();
  scheduler->point("has started a thread");
}

void __wrap__ZNSt6thread4joinEv(std::thread* thread) {
  if (Scheduler* const scheduler = Scheduler::current()) {
    join(*scheduler, thread->native_handle());
  }
  __real__ZNSt6thread4joinEv(thread);
}

}  // extern "C"
