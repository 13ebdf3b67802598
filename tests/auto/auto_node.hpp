// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <asio/post.hpp>
#include <asio/thread_pool.hpp>
#include <asio/use_future.hpp>

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/patterns.hpp>

#include "common/comes_true.hpp"
#include "common/patience.hpp"
#include "mortal_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::roads::testing {

inline constexpr std::size_t page = std::size_t{64} << 10;
inline constexpr std::size_t pages = 4;
using kvferry_test::comes_true;
using kvferry_test::long_enough;
inline const std::vector<std::uint64_t> all_pages{0, 1, 2, 3};

[[nodiscard]] inline bool begins(const std::string& text, const std::string& with) { return text.starts_with(with); }
[[nodiscard]] inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

[[nodiscard]] inline AutoRoad shm() { return AutoTransferChannel::default_roads().at(0); }
[[nodiscard]] inline AutoRoad tcp() { return AutoTransferChannel::default_roads().at(1); }
[[nodiscard]] inline AutoRoad tcp_named(std::string name) {
  return road<TcpTransferChannel>(std::move(name), TcpOptions());
}
[[nodiscard]] inline AutoRoad mortal_shm(std::shared_ptr<Fate> fate) {
  return mortal_road<ShmTransferChannel, ShmOptions>("shm", std::move(fate), true);
}

[[nodiscard]] inline AutoRoad mortal_tcp(std::string name, std::shared_ptr<Fate> fate) {
  return mortal_road<TcpTransferChannel, TcpOptions>(std::move(name), std::move(fate));
}

[[nodiscard]] inline AutoOptions with(std::vector<AutoRoad> given, std::vector<std::string> required = {}) {
  AutoOptions options;
  options.roads = std::move(given);
  options.require = std::move(required);
  return options;
}

/// With time for each road, where a test gives it none of its own: on a busy machine the next one would be taken.
[[nodiscard]] inline AutoOptions patient(AutoOptions options) {
  if (options.road_timeout == AutoOptions().road_timeout) {
    options.road_timeout = long_enough;
  }
  return kvferry_test::patient(std::move(options));
}

/// A channel with memory of its own, and what it logs.
struct Node {
  explicit Node(AutoOptions given = {}) : memory(pages * page) {
    AutoOptions options = patient(std::move(given));
    options.regions = {{memory.data(), memory.size(), page}};
    if (options.peer_init_url.empty()) {
      options.peer_init_url = kvferry::testing::own_loopback_url();
    }
    options.log_sink = [this](const LogRecord& record) {
      if (record.level == LogLevel::warning) {
        const std::lock_guard lock(mutex);
        warnings.push_back(std::string(record.event) + ": " + std::string(record.text));
      }
    };
    channel.emplace(std::move(options));
  }

  [[nodiscard]] std::error_code connect(const Node& to, std::string* diagnostic = nullptr,
                                        std::optional<std::chrono::milliseconds> timeout = {}) {
    std::error_code ec;
    (void)channel->lazy_init_peer_connection("a", "b", to.channel->peer_init_url(), {}, {timeout, diagnostic}, ec);
    return ec;
  }
  [[nodiscard]] std::future<std::optional<SideMessage>> begin_connect(const Node& to) {
    return channel->async_lazy_init_peer_connection("a", "b", to.channel->peer_init_url(), {}, {}, asio::use_future);
  }
  [[nodiscard]] MutableBuffer at(std::size_t index) { return {memory.data() + index * page, page}; }
  /// Writes pages with the patterns of seeds from this one on.
  [[nodiscard]] std::error_code write(std::uint64_t seed, std::string_view peer = "b") {
    std::vector<ConstBuffer> objects;
    for (const std::uint64_t index : all_pages) {
      kvferry::testing::fill(at(index), seed + index);
      objects.emplace_back(at(index));
    }
    std::error_code ec;
    (void)channel->batched_write(objects, {.peer_id = peer, .remote_indexes = all_pages}, ec);
    return ec;
  }
  [[nodiscard]] bool holds(std::uint64_t seed) {
    return std::ranges::all_of(all_pages, [&](std::uint64_t index) {
      return static_cast<bool>(kvferry::testing::matches(at(index), seed + index));
    });
  }
  [[nodiscard]] std::string path_to(const std::string& peer) const {
    return channel->peer_info(peer).value_or(PeerInfo{}).path;
  }
  /// Over all paths of a road.
  [[nodiscard]] std::uint64_t bytes_out(const std::string& road) const {
    std::uint64_t bytes = 0;
    for (const auto& path : channel->stats().paths) {
      bytes += path.name.starts_with(road + " ") ? path.bytes_out : 0;
    }
    return bytes;
  }
  [[nodiscard]] bool warned(const std::string& of) {
    const std::lock_guard lock(mutex);
    return std::ranges::any_of(warnings, [&](const std::string& one) { return one.find(of) != std::string::npos; });
  }

  std::mutex mutex;
  std::vector<std::string> warnings;
  std::vector<std::byte> memory;
  std::optional<AutoTransferChannel> channel;
};

/// The failure that a constructor throws.
[[nodiscard]] inline kit::Failure failure_of(AutoOptions options) {
  try {
    const Node node(std::move(options));
  } catch (const TransferError& error) {
    return {error.code(), error.what()};
  }
  return {};
}

/// Holds the only thread of a pool until it is let go. Nothing else runs there once this has been made: before, the thread
/// may still be within something, such as a turn that serves peers.
class HeldThread {
 public:
  explicit HeldThread(asio::thread_pool& pool) {
    std::promise<void> entered;
    auto is_held = entered.get_future();
    asio::post(pool, [entered = std::move(entered), go_on = go_on_.get_future()]() mutable {
      entered.set_value();
      go_on.wait();
    });
    is_held.wait();
  }
  HeldThread(const HeldThread&) = delete;
  HeldThread& operator=(const HeldThread&) = delete;
  /// A promise that is broken lets it go, too: so a test that fails before doesn't wait for ever.
  ~HeldThread() = default;

  void let_go() { go_on_.set_value(); }

 private:
  std::promise<void> go_on_;
};

}  // namespace kvferry::roads::testing
