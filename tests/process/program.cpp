// SPDX-License-Identifier: Apache-2.0
#include "program.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <map>

#include <kvferry/testing/test_watchdog.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {
namespace {

/// Half of what the test has that waits for it.
std::chrono::milliseconds longest_run() { return test_limit() / 2; }

std::map<std::string, int (*)()>& programs() {
  static std::map<std::string, int (*)()> all;
  return all;
}

std::string& given_argument() {
  static std::string argument;
  return argument;
}

int left_of(std::chrono::steady_clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
  return static_cast<int>(std::max<std::int64_t>(left.count(), 0));
}

/// Takes the child's end, killing it after the deadline.
void reap(pid_t pid, std::chrono::steady_clock::time_point deadline, Program::Ended& ended) {
  const int descriptor = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
  pollfd exited{descriptor, POLLIN, 0};
  if (::poll(&exited, 1, left_of(deadline)) <= 0) {
    ended.hung = true;
    ::kill(pid, SIGKILL);
  }
  ::close(descriptor);
  int status = 0;
  ::waitpid(pid, &status, 0);
  ended.exit_code = WIFEXITED(status) && !ended.hung ? WEXITSTATUS(status) : -1;
  ended.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

}  // namespace

Program::Program(const char* name, int (*body)()) { programs()[name] = body; }

const std::string& Program::argument() { return given_argument(); }

std::string Program::Ended::to_string() const {
  const std::string how = hung          ? "hung"
                          : signal != 0 ? "signal " + std::to_string(signal)
                                        : "exit code " + std::to_string(exit_code);
  return how + (output.empty() ? std::string() : ":\n" + output);
}

Program::Ended Program::run(const std::string& name, const std::string& argument) {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    return {};
  }
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  std::string program = "--program=" + name;
  std::string value = argument;
  std::string self = "/proc/self/exe";
  std::array<char*, 4> arguments{self.data(), program.data(), value.data(), nullptr};
  pid_t child = 0;
  const int failed = ::posix_spawn(&child, self.c_str(), &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  Ended ended;
  const auto deadline = std::chrono::steady_clock::now() + longest_run();
  std::array<char, 4096> text{};
  pollfd readable{ends[0], POLLIN, 0};
  while (failed == 0 && ::poll(&readable, 1, left_of(deadline)) > 0) {
    const ssize_t size = ::read(ends[0], text.data(), text.size());
    if (size <= 0) {
      break;
    }
    ended.output.append(text.data(), static_cast<std::size_t>(size));
  }
  ::close(ends[0]);
  if (failed == 0) {
    reap(child, deadline, ended);
  }
  return ended;
}

Program::Ended Program::wait_for(int pid) {
  Ended ended;
  reap(pid, std::chrono::steady_clock::now() + longest_run(), ended);
  return ended;
}

bool Program::asked_for(int argc, char** argv, int& exit_code) {
  const std::string option = "--program=";
  if (argc < 2 || std::string(argv[1]).rfind(option, 0) != 0) {
    return false;
  }
  given_argument() = argc > 2 ? argv[2] : "";
  const auto found = programs().find(std::string(argv[1]).substr(option.size()));
  if (found == programs().end()) {
    std::fprintf(stderr, "no program %s\n", argv[1]);
    exit_code = 127;
    return true;
  }
  try {
    exit_code = found->second();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "exception: %s\n", error.what());
    exit_code = 126;
  }
  std::fflush(stdout);
  return true;
}

}  // namespace kvferry::testing
