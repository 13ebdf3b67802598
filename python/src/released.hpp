// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <atomic>
#include <thread>

namespace kvferry::python {

/// The interpreter ends its daemon threads where they next want the GIL: in C++ that doesn't bear that, too. So its exit
/// waits until no thread is on the way from C++ into Python, and those that come later sleep for ever, as they do in newer
/// versions of CPython. All with the GIL, but for `descriptor`.
class InterpreterExit {
 public:
  [[nodiscard]] static bool has_begun() noexcept { return begun; }
  /// Can be read once the exit has begun: for those who wait for something that may never come.
  [[nodiscard]] static int descriptor();
  /// The calling thread is the one that goes on.
  static void begin();
  /// Returns when no other thread is between C++ and Python. Releases the GIL meanwhile.
  static void wait_for_threads();
  /// For a forked child: the parent's threads aren't there.
  static void forget_threads() noexcept { between = 0; }
  /// Once the exit has begun, a thread that isn't waited for gets no further than this.
  static void stop_here_if_begun() {
    if (begun && !is_waited_for && std::this_thread::get_id() != exiting_thread) {
      sleep_for_ever();
    }
  }

  /// Whether the exit waits for the calling thread to end by itself: one in a handler of a channel's, which is closed, or the
  /// one that forwards log records.
  static inline thread_local bool is_waited_for = false;

 private:
  friend class Released;
  friend class IntoPython;
  [[noreturn]] static void sleep_for_ever();
  static void leave() {
    --between;
    between.notify_all();
  }

  static inline std::atomic<bool> begun{false};
  static inline std::atomic<int> between{0};
  static inline std::thread::id exiting_thread;
};

/// While it lasts the GIL is released, except on the thread that exits, which ends the others. A thread that the exit waits
/// for releases it, too: what it waits for may need the GIL.
class Released {
 public:
  Released() {
    InterpreterExit::stop_here_if_begun();
    if (!InterpreterExit::begun || InterpreterExit::is_waited_for) {
      ++InterpreterExit::between;
      state_ = PyEval_SaveThread();
    }
  }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;
  ~Released() {
    if (state_ != nullptr) {
      PyEval_RestoreThread(state_);
      InterpreterExit::leave();
      InterpreterExit::stop_here_if_begun();
    }
  }

 private:
  PyThreadState* state_ = nullptr;
};

/// While it lasts C++ calls code in Python, where the GIL may go to another thread.
class IntoPython {
 public:
  IntoPython() {
    InterpreterExit::stop_here_if_begun();
    ++InterpreterExit::between;
  }
  IntoPython(const IntoPython&) = delete;
  IntoPython& operator=(const IntoPython&) = delete;
  ~IntoPython() { InterpreterExit::leave(); }
};

}  // namespace kvferry::python
