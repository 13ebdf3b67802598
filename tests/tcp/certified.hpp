// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/log.hpp>

#include "channel_pair.hpp"
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

using kvferry::testing::authority;
using kvferry::testing::CertificateDirectory;
using kvferry::testing::has;
using kvferry::testing::Identity;
using kvferry::testing::issue;

inline constexpr std::size_t certified_pages = 4;

/// The records that a channel logs.
class CertificateLog {
 public:
  [[nodiscard]] LogSink sink() {
    return [this](const LogRecord& record) {
      const std::lock_guard lock(mutex_);
      lines_.push_back(to_string(record));
      changed_.notify_all();
    };
  }
  /// Waits for such a line. @return whether it came.
  [[nodiscard]] bool wait_for(std::string_view event, std::string_view part) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, long_enough, [&] {
      return std::ranges::any_of(lines_, [&](const std::string& line) { return has(line, event) && has(line, part); });
    });
  }
  /// The lines with this event that have this in them.
  [[nodiscard]] std::size_t count(std::string_view event, std::string_view part = {}) {
    const std::lock_guard lock(mutex_);
    return static_cast<std::size_t>(
        std::ranges::count_if(lines_, [&](const std::string& line) { return has(line, event) && has(line, part); }));
  }
  [[nodiscard]] std::string all() {
    const std::lock_guard lock(mutex_);
    std::string text;
    for (const std::string& line : lines_) {
      text += line + '\n';
    }
    return text;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> lines_;
};

class Certified : public ::testing::Test {
 protected:
  [[nodiscard]] TcpOptions with(const CertificateDirectory& directory, CertificateLog* log = nullptr) {
    TcpOptions options = plain(log);
    options.certificates = directory.files();
    return options;
  }
  [[nodiscard]] static TcpOptions plain(CertificateLog* log = nullptr) {
    TcpOptions options;
    options.keyring = group_keyring();
    if (log != nullptr) {
      options.log_sink = log->sink();
    }
    return options;
  }
  static std::error_code connect(Node& from, Node& to, std::string* diagnostic = nullptr, std::string_view as = "a") {
    std::error_code ec;
    (void)from.channel->lazy_init_peer_connection(as, "b", to.channel->peer_init_url(), std::nullopt,
                                                  {std::nullopt, diagnostic}, ec);
    return ec;
  }
  static void expect_pages_move(Node& from, Node& to, unsigned seed = 1) {
    from.fill(seed);
    const auto all = indexes(certified_pages);
    EXPECT_EQ(from.channel->batched_write(from.pages(certified_pages), {.peer_id = "b", .remote_indexes = all}),
              certified_pages);
    EXPECT_EQ(from.memory, to.memory);
  }
  static std::string refused(TcpOptions options, std::error_code code) {
    try {
      const Node node(certified_pages, std::move(options));
      return "it is taken";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      return error.what();
    }
  }

  const Identity ca_ = authority("ca");
  const Identity a_own_ = issue({.name = "a", .by = &ca_});
  const Identity b_own_ = issue({.name = "b", .by = &ca_});
  const CertificateDirectory a_files_{a_own_, ca_};
  const CertificateDirectory b_files_{b_own_, ca_};
  CertificateLog a_log_;
  CertificateLog b_log_;
};

}  // namespace kvferry::tcp::testing
