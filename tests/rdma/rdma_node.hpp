// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/rdma_transfer_channel.hpp>

#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include "rdma/endpoint.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

inline constexpr std::size_t page_size = 4096;
inline constexpr std::chrono::seconds long_enough{60};

/// The first active ports of this machine.
inline std::vector<RdmaRail> first_rails(std::size_t count) {
  auto rails = RdmaTransferChannel::active_rails();
  if (rails.size() < count) {
    throw std::runtime_error("this takes " + std::to_string(count) + " active RDMA ports, there are " +
                             std::to_string(rails.size()));
  }
  rails.resize(count);
  return rails;
}

/// Waits for something that another party does without telling; no longer than it may take.
template <class Condition>
[[nodiscard]] bool eventually(Condition condition, std::chrono::steady_clock::duration limit = long_enough) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) {
      return false;
    }
    std::this_thread::yield();
  }
  return true;
}

/// What a channel says of itself in handshakes, changed before the peer gets it.
using ChangeEndpoint = std::function<void(Endpoint&)>;

/// A channel that may lie: about itself when it is connected to (`told`) or connects (`asked`), or to itself about the
/// peer when it connects (`heard`), as a program would that wants to reach what it may not.
class LyingChannel final : public RdmaTransferChannel {
 public:
  LyingChannel(RdmaOptions options, ChangeEndpoint told, ChangeEndpoint asked, ChangeEndpoint heard)
      : RdmaTransferChannel(holding(std::move(options))),
        told_(std::move(told)),
        asked_(std::move(asked)),
        heard_(std::move(heard)) {
    answer_side_messages();
  }
  ~LyingChannel() override { close(); }

 protected:
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override {
    return changed(RdmaTransferChannel::accept(std::move(host), remote_endpoint, deadline, std::move(on_link)), told_);
  }

  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override {
    return std::make_unique<LyingDial>(RdmaTransferChannel::dial(peer_id), asked_, heard_);
  }

 private:
  static RdmaOptions holding(RdmaOptions options) {
    options.hold_side_messages = true;
    return options;
  }

  static Bytes changed(const Bytes& bytes, const ChangeEndpoint& change) {
    if (!change) {
      return bytes;
    }
    std::error_code ec;
    auto endpoint = kit::decode_endpoint<Endpoint>(bytes, ec);
    change(endpoint);
    return kit::encode_endpoint(endpoint);
  }

  class LyingDial final : public kit::Dial {
   public:
    LyingDial(std::unique_ptr<kit::Dial> dial, ChangeEndpoint asked, ChangeEndpoint heard)
        : dial_(std::move(dial)), asked_(std::move(asked)), heard_(std::move(heard)) {}
    [[nodiscard]] Bytes local_endpoint() override { return changed(dial_->local_endpoint(), asked_); }
    void connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote, kit::Clock::time_point deadline,
                 kit::LinkHandler on_link) override {
      dial_->connect(std::move(host), changed(remote, heard_), deadline, std::move(on_link));
    }

   private:
    const std::unique_ptr<kit::Dial> dial_;
    const ChangeEndpoint asked_;
    const ChangeEndpoint heard_;
  };

  const ChangeEndpoint told_;
  const ChangeEndpoint asked_;
  const ChangeEndpoint heard_;
};

struct NodeOptions {
  RdmaOptions channel = {};
  std::size_t rails = 1;
  Access access = Access::read_write;
  bool listens = true;
  ChangeEndpoint told = {};
  ChangeEndpoint asked = {};
  ChangeEndpoint heard = {};
};

/// A channel with one region of memory of its own, in the middle of memory that nobody may touch.
struct Node {
  explicit Node(std::size_t pages, NodeOptions options = {})
      : memory((pages + 2 * guard_pages) * page_size, background),
        region(std::span(memory).subspan(guard_pages * page_size, pages * page_size)) {
    RdmaOptions& channel_options = options.channel;
    channel_options.regions.push_back({region.data(), region.size(), page_size, options.access});
    // On a machine that is slow or busy, each call may take its time.
    channel_options.default_timeout = std::max<std::chrono::milliseconds>(channel_options.default_timeout, long_enough);
    channel_options.handshake_timeout =
        std::max<std::chrono::milliseconds>(channel_options.handshake_timeout, long_enough);
    if (channel_options.rails.empty() && options.rails != 0) {
      channel_options.rails = first_rails(options.rails);
    }
    if (options.listens && channel_options.peer_init_url.empty()) {
      channel_options.peer_init_url = kvferry::testing::own_loopback_url();
    }
    channel = std::make_unique<LyingChannel>(channel_options, std::move(options.told), std::move(options.asked),
                                             std::move(options.heard));
  }

  [[nodiscard]] MutableBuffer page(std::size_t index, std::size_t size = page_size) const {
    return region.subspan(index * page_size, size);
  }
  [[nodiscard]] std::vector<MutableBuffer> pages(std::size_t count, std::size_t first = 0) const {
    std::vector<MutableBuffer> all;
    for (std::size_t i = 0; i < count; ++i) {
      all.push_back(page(first + i));
    }
    return all;
  }
  void fill(unsigned seed) const {
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i + sizeof(std::uint64_t) <= region.size(); i += sizeof(std::uint64_t)) {
      const std::uint64_t value = random();
      std::memcpy(region.data() + i, &value, sizeof(value));
    }
  }
  void fill(std::byte value) const { std::ranges::fill(region, value); }
  // In one call, as tests are compiled without optimisation and may run on an emulated machine.
  [[nodiscard]] bool holds(std::byte value) const {
    return region.front() == value && std::memcmp(region.data(), region.data() + 1, region.size() - 1) == 0;
  }
  [[nodiscard]] bool guards_intact() const {
    const auto is_background = [](std::byte byte) { return byte == background; };
    const std::size_t guard = guard_pages * page_size;
    return std::ranges::all_of(std::span(memory).first(guard), is_background) &&
           std::ranges::all_of(std::span(memory).last(guard), is_background);
  }
  void connect(const std::string& own_id, const std::string& peer_id, const Node& peer) const {
    channel->lazy_init_peer_connection(own_id, peer_id, peer.channel->peer_init_url());
  }

  static constexpr std::size_t guard_pages = 64;
  static constexpr std::byte background{0xee};

  std::vector<std::byte> memory;
  MutableBuffer region;
  std::unique_ptr<LyingChannel> channel;
};

inline std::vector<std::uint64_t> indexes(std::size_t count, std::size_t first = 0) {
  std::vector<std::uint64_t> all(count);
  std::iota(all.begin(), all.end(), std::uint64_t{first});
  return all;
}

inline bool same(ConstBuffer x, ConstBuffer y) {
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size()) == 0;
}
inline bool same(const Node& x, const Node& y) { return same(x.region, y.region); }

}  // namespace kvferry::rdma::testing
