// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/process_figures.hpp"

namespace kvferry::inline KVFERRY_ABI::load {

inline constexpr std::size_t page_size = 4096;

inline TcpOptions quiet() {
  TcpOptions options;
  options.poll = PollPolicy::never();
  options.log_sink = [](const LogRecord&) {};
  options.handshake_timeout = std::chrono::minutes(1);  // on a machine that is busy with others, too
  return options;
}

/// A channel that all others connect to, in a process of its own: this program again, which runs the same test. That test
/// begins with `if (Hub::is_here()) { Hub::serve(pages); return; }`.
class Hub {
 public:
  [[nodiscard]] static bool is_here() { return testing::PeerProcess::is_peer(); }

  static void serve(std::size_t pages) {
    testing::LineSocket line = testing::PeerProcess::line_to_starter();
    std::vector<std::byte> memory(pages * page_size);
    TcpOptions options = quiet();
    options.regions = {{memory.data(), memory.size(), page_size}};
    options.peer_init_url = kvferry::testing::own_loopback_url();
    TcpTransferChannel channel(options);
    line.write_line(channel.peer_init_url());
    (void)line.read_line(longest_run);  // its end
  }

  Hub() : process_(longest_run), url_(process_.next_line()) {}

  [[nodiscard]] const std::string& url() const noexcept { return url_; }
  [[nodiscard]] testing::ProcessFigures figures() const { return testing::ProcessFigures::of(process_.pid()); }

  /// Its figures when the peers that have gone are forgotten, or after a minute.
  [[nodiscard]] testing::ProcessFigures figures_at_rest(std::size_t descriptors) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (figures().descriptors > descriptors && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return figures();
  }

  /// Closes its channel. @return whether its process ended well.
  [[nodiscard]] bool stop() { return process_.finish(); }

 private:
  static constexpr std::chrono::hours longest_run{1};

  testing::PeerProcess process_;
  std::string url_;
};

}  // namespace kvferry::load
