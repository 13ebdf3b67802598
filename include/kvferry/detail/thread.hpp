// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>
#include <signal.h>

#include <string>
#include <thread>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// While it lasts no signal interrupts the calling thread, and threads that it makes - ZeroMQ's, too - block signals
/// for good: they belong to the program's own threads. Not blocked is what a thread brings upon itself (SIGSEGV,
/// SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS), for which the program may have a handler that writes a report.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t blocked;
    sigfillset(&blocked);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) {
      sigdelset(&blocked, own);
    }
    pthread_sigmask(SIG_BLOCK, &blocked, &before_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

/// Names the calling thread for `top -H`, `ps -L` and debuggers: at most 15 characters.
inline void name_this_thread(const std::string& name) noexcept { pthread_setname_np(pthread_self(), name.c_str()); }

/// A thread that is never disturbed by signals, with a name.
/// @throws std::system_error EAGAIN if there are too many threads.
template <class Body>
[[nodiscard]] std::thread start_thread(std::string name, Body body) {
  const SignalsBlocked blocked;
  return std::thread([name = std::move(name), body = std::move(body)]() mutable {
    name_this_thread(name);
    body();
  });
}

}  // namespace kvferry
