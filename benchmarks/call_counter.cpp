// SPDX-License-Identifier: Apache-2.0
// To be preloaded: counts a program's calls of some functions and says at its end, on standard error, how many there were.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>

namespace {

struct Counters {
  std::atomic<std::uint64_t> mutex_locks{0};
  std::atomic<std::uint64_t> mutex_tries{0};
  std::atomic<std::uint64_t> clock_reads{0};
  std::atomic<std::uint64_t> epoll_ctls{0};
  std::atomic<std::uint64_t> allocations{0};

  ~Counters() {
    std::array<char, 256> line{};
    const int size = std::snprintf(
        line.data(), line.size(),
        "called: mutex_locks=%lu mutex_tries=%lu clock_reads=%lu epoll_ctls=%lu allocations=%lu\n", mutex_locks.load(),
        mutex_tries.load(), clock_reads.load(), epoll_ctls.load(), allocations.load());
    (void)!::write(STDERR_FILENO, line.data(), static_cast<std::size_t>(size));
  }
};

Counters counters;

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

void count(std::atomic<std::uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);

void* malloc(std::size_t size) noexcept {
  count(counters.allocations);
  return __libc_malloc(size);
}

void* calloc(std::size_t number, std::size_t size) noexcept {
  count(counters.allocations);
  return __libc_calloc(number, size);
}

void* realloc(void* memory, std::size_t size) noexcept {
  count(counters.allocations);
  return __libc_realloc(memory, size);
}

int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
  static auto* const lock = next<int(pthread_mutex_t*)>("pthread_mutex_lock");
  count(counters.mutex_locks);
  return lock(mutex);
}

int pthread_mutex_trylock(pthread_mutex_t* mutex) noexcept {
  static auto* const lock = next<int(pthread_mutex_t*)>("pthread_mutex_trylock");
  count(counters.mutex_tries);
  return lock(mutex);
}

int clock_gettime(clockid_t clock, timespec* time) noexcept {
  static auto* const read = next<int(clockid_t, timespec*)>("clock_gettime");
  count(counters.clock_reads);
  return read(clock, time);
}

int epoll_ctl(int epoll, int operation, int descriptor, epoll_event* event) noexcept {
  static auto* const control = next<int(int, int, int, epoll_event*)>("epoll_ctl");
  count(counters.epoll_ctls);
  return control(epoll, operation, descriptor, event);
}

}  // extern "C"

#pragma GCC visibility pop
