// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <utility>

namespace kvferry_test {

/// A forked child that waits at a pipe until it is told to go on. It is killed at the end, whatever happens.
class WaitingChild {
 public:
  /// @param then what the child does; it exits with what that returns.
  template <class Then>
  explicit WaitingChild(Then then) {
    EXPECT_EQ(::pipe2(gate_.data(), O_CLOEXEC), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      char byte = 0;
      (void)!::read(gate_[0], &byte, 1);
      ::_exit(then());
    }
    EXPECT_GT(pid_, 0);
  }
  WaitingChild() : WaitingChild([] { return 0; }) {}
  WaitingChild(const WaitingChild&) = delete;
  WaitingChild& operator=(const WaitingChild&) = delete;
  ~WaitingChild() {
    kill();
    for (const int end : gate_) {
      ::close(end);
    }
  }

  [[nodiscard]] pid_t pid() const { return pid_; }
  void go_on() { EXPECT_EQ(::write(gate_[1], "x", 1), 1); }

  /// Waits for its end. @return the status, as waitpid(2) has it.
  int wait() {
    const pid_t child = std::exchange(pid_, -1);
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return status;
  }
  /// When it returns, the child is gone.
  void kill() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      (void)wait();
    }
  }

 private:
  std::array<int, 2> gate_{};
  pid_t pid_ = -1;
};

}  // namespace kvferry_test
