// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing::shared {

using kvferry_test::long_enough;

inline constexpr std::size_t page = std::size_t{64} << 10;
inline constexpr std::size_t pages = 8;

inline const std::vector<std::uint64_t> all_pages{0, 1, 2, 3, 4, 5, 6, 7};

inline ShmOptions without_process_memory() {
  ShmOptions options;
  options.process_memory = false;
  return options;
}

/// A channel whose memory is shared, the first `pages` pages; with as much of its own behind.
struct Node {
  explicit Node(ShmOptions options = without_process_memory(), Access access = Access::read_write, bool listens = true)
      : memory(pages * page), own(pages * page) {
    options.regions = {memory.region(page, access), {own.data(), own.size(), page}};
    if (listens) {
      options.peer_init_url = kvferry::testing::own_loopback_url();
    }
    channel.emplace(kvferry_test::patient(std::move(options)));
  }

  [[nodiscard]] std::string path_to(const std::string& peer) const {
    return channel->peer_info(peer).value_or(PeerInfo{}).path;
  }
  /// Waits until the two sides have told each other what they map.
  [[nodiscard]] bool path_has(const std::string& peer, const std::string& text) const {
    const auto until = std::chrono::steady_clock::now() + long_enough;
    while (path_to(peer).find(text) == std::string::npos) {
      if (std::chrono::steady_clock::now() > until) {
        ADD_FAILURE() << text << " is not in: " << path_to(peer);
        return false;
      }
      std::this_thread::yield();
    }
    return true;
  }
  [[nodiscard]] PathStats path_stats(const std::string& name) const {
    const auto stats = channel->stats();
    const auto found = std::ranges::find(stats.paths, name, &PathStats::name);
    EXPECT_NE(found, stats.paths.end());
    return found == stats.paths.end() ? PathStats{} : *found;
  }
  [[nodiscard]] MutableBuffer object(std::size_t index) const { return {memory.data() + index * page, page}; }
  [[nodiscard]] std::vector<MutableBuffer> objects() const {
    std::vector<MutableBuffer> all;
    for (const std::uint64_t index : all_pages) {
      all.push_back(object(index));
    }
    return all;
  }
  [[nodiscard]] std::vector<ConstBuffer> sources() const {
    const auto all = objects();
    return {all.begin(), all.end()};
  }

  SharedRegion memory;
  std::vector<std::byte> own;
  std::optional<ShmTransferChannel> channel;
};

struct Pair {
  explicit Pair(ShmOptions a_options = without_process_memory(), ShmOptions b_options = without_process_memory(),
                Access access = Access::read_write)
      : b(std::move(b_options), access), a(std::move(a_options), access) {
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }
  [[nodiscard]] bool mapped() const {
    const std::string both = "1 of the peer's regions mapped; the peer maps 1 of this side's regions";
    return a.path_has("b", both) && b.path_has("a", both);
  }

  Node b;
  Node a;
};

}  // namespace kvferry::shm::testing::shared
