// SPDX-License-Identifier: Apache-2.0
#include "peer_process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <stdexcept>
#include <system_error>

#include <kvferry/testing/test_watchdog.hpp>

namespace kvferry_test {
namespace {

/// Nothing here takes half of a test's limit; whatever does hangs.
int deadline_ms() { return static_cast<int>((kvferry::testing::test_limit() / 2).count()); }

[[noreturn]] void throw_errno(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

/// The end to read from and the end to write to.
std::array<int, 2> make_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    throw_errno("pipe2");
  }
  return ends;
}

/// The same with a terminal at the end to write to.
std::array<int, 2> make_terminal() {
  const int master = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (master < 0 || ::grantpt(master) != 0 || ::unlockpt(master) != 0) {
    throw_errno("posix_openpt");
  }
  const int terminal = ::open(::ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (terminal < 0) {
    throw_errno("ptsname");
  }
  return {master, terminal};
}

}  // namespace

PeerProcess::PeerProcess(std::string path, const Arguments& arguments, Errors errors) : path_(std::move(path)) {
  std::vector<char*> argv{path_.data()};
  auto copies = arguments;
  for (auto& copy : copies) {
    argv.push_back(copy.data());
  }
  argv.push_back(nullptr);

  std::array<std::array<int, 2>, 2> pipes{make_pipe(), errors == Errors::pipe ? make_pipe() : make_terminal()};
  pid_ = ::fork();
  if (pid_ < 0) {
    throw_errno("fork");
  }
  if (pid_ == 0) {
    ::dup2(pipes[0][1], STDOUT_FILENO);
    ::dup2(pipes[1][1], STDERR_FILENO);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  for (std::size_t i = 0; i < pipes.size(); ++i) {
    ::close(pipes[i][1]);
    streams_[i].fd = pipes[i][0];
  }
  pidfd_ = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));  // glibc 2.36 declares the wrapper for C only.
  if (pidfd_ < 0) {
    throw_errno("pidfd_open");
  }
}

PeerProcess::~PeerProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  ::close(pidfd_);
  for (const auto& stream : streams_) {
    if (stream.fd >= 0) {
      ::close(stream.fd);
    }
  }
}

void PeerProcess::signal(int number) const {
  if (::kill(pid_, number) != 0) {
    throw_errno("kill");
  }
}

std::string PeerProcess::wait_for_line(std::string_view text) {
  do {
    for (const auto& stream : streams_) {
      if (auto line = stream.line_with(text); !line.empty()) {
        return line;
      }
    }
  } while (read_more());
  throw std::runtime_error(path_ + " ended without a line with '" + std::string(text) + "' in it:\n" + output() +
                           errors());
}

int PeerProcess::wait_for_exit() {
  while (read_more()) {
  }
  pollfd event{pidfd_, POLLIN, 0};
  if (::poll(&event, 1, deadline_ms()) != 1) {
    throw std::runtime_error(path_ + " closed its output, but does not end");
  }
  int status = 0;
  ::waitpid(pid_, &status, 0);
  pid_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

bool PeerProcess::read_more() {
  // poll ignores those that are -1.
  std::array<pollfd, 2> events{pollfd{streams_[0].fd, POLLIN, 0}, pollfd{streams_[1].fd, POLLIN, 0}};
  if (streams_[0].fd < 0 && streams_[1].fd < 0) {
    return false;
  }
  if (::poll(events.data(), events.size(), deadline_ms()) <= 0) {
    throw std::runtime_error(path_ + " has been silent for too long:\n" + output() + errors());
  }
  for (std::size_t i = 0; i < events.size(); ++i) {
    if (events[i].revents == 0) {
      continue;
    }
    std::array<char, 4096> buffer;
    const auto size = ::read(streams_[i].fd, buffer.data(), buffer.size());
    if (size > 0) {
      streams_[i].text.append(buffer.data(), static_cast<std::size_t>(size));
    } else {
      ::close(streams_[i].fd);
      streams_[i].fd = -1;
    }
  }
  return true;
}

std::string PeerProcess::Stream::line_with(std::string_view part) const {
  const auto found = text.find(part);
  const auto end = text.find('\n', found);
  if (found == std::string::npos || end == std::string::npos) {
    return {};
  }
  const auto begin = text.rfind('\n', found);
  const auto first = begin == std::string::npos ? 0 : begin + 1;
  return text.substr(first, end - first);
}

}  // namespace kvferry_test
