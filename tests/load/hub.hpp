// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include "common/process_figures.hpp"

namespace kvferry::inline KVFERRY_ABI::load {

inline constexpr std::size_t page_size = 4096;

inline TcpOptions quiet() {
  TcpOptions options;
  options.poll = PollPolicy::never();
  options.log_sink = [](const LogRecord&) {};
  return options;
}

/// A channel that all others connect to, in a process of its own. To be made before any channel is.
class Hub {
 public:
  explicit Hub(std::size_t pages) {
    std::array<int, 2> url{};
    std::array<int, 2> end{};
    if (::pipe(url.data()) != 0 || ::pipe(end.data()) != 0 || (process_ = ::fork()) == -1) {
      throw std::runtime_error("no process for the hub");
    }
    if (process_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::close(url[0]);
      ::close(end[1]);
      ::_exit(serve(pages, url[1], end[0]));
    }
    ::close(url[1]);
    ::close(end[0]);
    end_ = end[1];
    char byte = 0;
    while (::read(url[0], &byte, 1) == 1) {
      url_ += byte;
    }
    ::close(url[0]);
  }
  Hub(const Hub&) = delete;
  Hub& operator=(const Hub&) = delete;
  ~Hub() { (void)stop(); }

  [[nodiscard]] const std::string& url() const noexcept { return url_; }
  [[nodiscard]] testing::ProcessFigures figures() const { return testing::ProcessFigures::of(process_); }

  /// What it holds when those that have gone are forgotten, or after 10 s.
  [[nodiscard]] testing::ProcessFigures figures_at_rest(std::size_t descriptors) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (figures().descriptors > descriptors && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return figures();
  }

  /// Closes its channel. @return whether its process ended well.
  [[nodiscard]] bool stop() {
    if (process_ == -1) {
      return true;
    }
    ::close(end_);
    int status = 0;
    ::waitpid(process_, &status, 0);
    process_ = -1;
    return status == 0;
  }

 private:
  static int serve(std::size_t pages, int url, int end) {
    try {
      std::vector<std::byte> memory(pages * page_size);
      TcpOptions options = quiet();
      options.regions = {{memory.data(), memory.size(), page_size}};
      options.peer_init_url = "tcp://127.0.0.1:0";
      TcpTransferChannel channel(options);
      const std::string own = channel.peer_init_url();
      if (::write(url, own.data(), own.size()) != static_cast<ssize_t>(own.size())) {
        return 2;
      }
      ::close(url);
      char ignored = 0;
      (void)!::read(end, &ignored, 1);
      return 0;
    } catch (...) {
      return 1;
    }
  }

  pid_t process_ = -1;
  int end_ = -1;
  std::string url_;
};

}  // namespace kvferry::load
