// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// A file descriptor that is closed.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int value) : value_(value) {}
  FileDescriptor(FileDescriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(value_, other.value_);
    return *this;
  }
  ~FileDescriptor() { reset(); }

  [[nodiscard]] int get() const { return value_; }
  void reset() {
    if (value_ >= 0) {
      ::close(std::exchange(value_, -1));
    }
  }

 private:
  int value_ = -1;
};

/// Waits until a descriptor is readable.
inline bool wait_readable(int descriptor, std::chrono::milliseconds limit) {
  pollfd polled{descriptor, POLLIN, 0};
  return limit.count() > 0 && ::poll(&polled, 1, static_cast<int>(limit.count())) > 0;
}

/// Lines of text over a socket, each wait bounded.
class LineSocket {
 public:
  explicit LineSocket(FileDescriptor socket) : socket_(std::move(socket)) {}

  /// @return whether the other side is still there. The socket's buffer holds any number of lines that a test writes.
  bool write_line(std::string line) {
    line += '\n';
    return ::send(socket_.get(), line.data(), line.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(line.size());
  }

  /// @return nothing at the end of the stream or of the time.
  [[nodiscard]] std::optional<std::string> read_line(std::chrono::milliseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    for (;;) {
      if (const auto newline = buffered_.find('\n'); newline != std::string::npos) {
        std::string line = buffered_.substr(0, newline);
        buffered_.erase(0, newline + 1);
        return line;
      }
      if (!read_more(end)) {
        return std::nullopt;
      }
    }
  }

  /// Tells the other side that nothing more will come.
  void end_output() { ::shutdown(socket_.get(), SHUT_WR); }

 private:
  bool read_more(std::chrono::steady_clock::time_point end) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    if (!wait_readable(socket_.get(), left)) {
      return false;
    }
    std::array<char, 512> chunk{};
    const ssize_t size = ::recv(socket_.get(), chunk.data(), chunk.size(), 0);
    if (size <= 0) {
      return false;
    }
    buffered_.append(chunk.data(), static_cast<std::size_t>(size));
    return true;
  }

  FileDescriptor socket_;
  std::string buffered_;
};

/// A second process that runs the test which is running here, in the role of the peer.
///
/// The process is this executable again, told by `--gtest_filter` to run this test alone, so that test and peer stand
/// in one body, and nothing is asked of `main`: `if (PeerProcess::is_peer()) { ...; return; }`. It is killed at the end
/// of the test, whatever happens, and does not survive this process.
class PeerProcess {
 public:
  /// Whether this is the process that `PeerProcess` started.
  [[nodiscard]] static bool is_peer() { return std::getenv(socket_variable) != nullptr; }

  /// In the peer: the line to the process that started it.
  [[nodiscard]] static LineSocket line_to_starter() {
    return LineSocket(FileDescriptor(std::atoi(std::getenv(socket_variable))));
  }

  explicit PeerProcess(std::chrono::milliseconds limit) : limit_(limit), line_(FileDescriptor()) {
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) {
      throw std::system_error(errno, std::generic_category(), "socketpair");
    }
    line_ = LineSocket(FileDescriptor(ends[0]));
    const FileDescriptor peers_end(ends[1]);
    const std::vector<std::string> arguments = peer_arguments();
    const std::vector<std::string> environment = peer_environment(peers_end.get());
    const std::vector<char*> argv = pointers(arguments);
    const std::vector<char*> envp = pointers(environment);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) {
      throw std::system_error(errno, std::generic_category(), "fork");
    }
    if (pid_ == 0) {
      become_peer(parent, peers_end.get(), argv.data(), envp.data());
    }
  }
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;
  ~PeerProcess() {
    if (pid_ > 0) {
      kill();
    }
  }

  [[nodiscard]] pid_t pid() const { return pid_; }

  /// Sends a command and waits for the answer; a test failure and an empty string if there is none.
  std::string ask(const std::string& command) {
    tell(command);
    return next_line();
  }
  void tell(const std::string& command) { EXPECT_TRUE(line_.write_line(command)) << "the peer process has gone"; }
  std::string next_line() {
    auto line = line_.read_line(limit_);
    EXPECT_TRUE(line.has_value()) << "the peer process said nothing";
    return std::move(line).value_or("");
  }

  /// When it returns, the process has stopped altogether.
  void stop() {
    ::kill(pid_, SIGSTOP);
    int status = 0;
    ::waitpid(pid_, &status, WUNTRACED);
    EXPECT_TRUE(WIFSTOPPED(status)) << "the peer process has ended, with status " << status;
  }
  void resume() { ::kill(pid_, SIGCONT); }

  /// kill -9. When it returns, the process is gone.
  void kill() {
    ::kill(pid_, SIGKILL);
    ::waitpid(std::exchange(pid_, -1), nullptr, 0);
  }

  /// Waits for the process to end by itself, which it does when it has been told to, and says whether its test passed.
  bool finish() {
    line_.end_output();
    const FileDescriptor process(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
    if (!wait_readable(process.get(), limit_)) {
      ADD_FAILURE() << "the peer process does not end";
      kill();
      return false;
    }
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "the peer process failed, with status " << status;
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }

 private:
  static constexpr const char* socket_variable = "KVFERRY_TESTING_PEER_SOCKET";

  [[nodiscard]] static std::vector<std::string> peer_arguments() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    return {"/proc/self/exe", std::string("--gtest_filter=") + test->test_suite_name() + "." + test->name(),
            "--gtest_brief=1"};
  }

  /// This process's environment without what GoogleTest would take from it (a shard, an output file, ...).
  [[nodiscard]] static std::vector<std::string> peer_environment(int socket) {
    std::vector<std::string> environment;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string_view variable(*entry);
      if (!variable.starts_with("GTEST_") && !variable.starts_with("TEST_") &&
          !variable.starts_with("XML_OUTPUT_FILE")) {
        environment.emplace_back(variable);
      }
    }
    environment.push_back(std::string(socket_variable) + "=" + std::to_string(socket));
    return environment;
  }

  [[nodiscard]] static std::vector<char*> pointers(const std::vector<std::string>& strings) {
    std::vector<char*> result;
    for (const std::string& string : strings) {
      result.push_back(const_cast<char*>(string.c_str()));
    }
    result.push_back(nullptr);
    return result;
  }

  /// Only what is safe between fork and exec in a process with threads. The peer must not hold this process's sockets
  /// open.
  [[noreturn]] static void become_peer(pid_t parent, int socket, char* const* argv, char* const* envp) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() == parent && ::close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) == 0 && ::fcntl(socket, F_SETFD, 0) == 0 &&
        ::dup2(STDERR_FILENO, STDOUT_FILENO) >= 0) {
      ::execve(argv[0], argv, envp);
    }
    ::_exit(127);
  }

  std::chrono::milliseconds limit_;
  LineSocket line_;
  pid_t pid_ = -1;
};

}  // namespace kvferry::testing
