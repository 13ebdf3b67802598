// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/testing/patterns.hpp>
#include <kvferry/testing/pausable_executor.hpp>
#include <kvferry/testing/peer_memory.hpp>
#include <kvferry/testing/suite_options.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

struct RegionSpec {
  std::size_t pages = 64;
  std::size_t page_size = 4096;
  Access access = Access::read_write;
};

/// Options of a `Node`.
struct NodeSpec {
  std::string id = {};                   ///< Empty: the fixture numbers it.
  std::vector<RegionSpec> regions{{}};   ///< Regions that peers may reach.
  std::size_t local_bytes = 256 * 1024;  ///< The size of one more region, the last, closed to peers, for local objects.
  bool listens = true;
  bool pausable = false;          ///< Runs on an executor that `Node::pause` holds up.
  std::string init_url = {};      ///< Empty: the traits' `listen_url`.
  SideMessageAnswer answer = {};  ///< Set: made by `Traits::make_answering_channel`.
  ChannelOptions options = suite_options();
};

/// A channel with its memory and a name.
class Node {
 public:
  using MakeChannel = std::function<std::unique_ptr<BaseTransferChannel>(ChannelOptions)>;
  using Allocate = std::function<std::shared_ptr<std::byte>(std::size_t)>;

  /// @param options_url where to listen if `spec.listens`.
  Node(NodeSpec spec, const std::string& options_url, const MakeChannel& make_channel, Allocate allocate)
      : id_(std::move(spec.id)), allocate_(std::move(allocate)) {
    ChannelOptions options = std::move(spec.options);
    for (const RegionSpec& region : spec.regions) {
      add_region(options, region);
    }
    if (spec.local_bytes > 0) {
      const std::size_t page_size = spec.regions.empty() ? 4096 : spec.regions.front().page_size;
      add_region(options, {(spec.local_bytes + page_size - 1) / page_size, page_size, Access::none});
      local_ = memory_.back().span();
    }
    if (spec.listens) {
      options.peer_init_url = options_url;
    }
    if (spec.pausable) {
      executor_ = std::make_unique<PausableExecutor>();
      options.executor = executor_->executor();
    }
    channel_ = make_channel(std::move(options));
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  ~Node() { destroy_channel(); }

  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] BaseTransferChannel& channel() const {
    if (channel_ == nullptr) {
      throw std::logic_error("the channel of " + id_ + " is gone");
    }
    return *channel_;
  }
  BaseTransferChannel* operator->() const { return &channel(); }
  [[nodiscard]] std::string url() const { return channel().peer_init_url(); }

  /// Destroys the channel and keeps the memory.
  void destroy_channel() {
    resume();
    channel_.reset();
  }

  [[nodiscard]] PeerMemory region(std::size_t number = 0) const { return PeerMemory(memory_.at(number).span()); }
  [[nodiscard]] PeerMemory page(std::uint64_t index, std::size_t region_number = 0) const {
    const Memory& memory = memory_.at(region_number);
    return PeerMemory(memory.span().subspan(static_cast<std::size_t>(index) * memory.page_size, memory.page_size));
  }

  /// Whether nothing was put into a region.
  [[nodiscard]] ::testing::AssertionResult untouched(std::size_t number = 0) const {
    return is_constant(region(number), background);
  }

  /// Takes objects of these sizes from the local region, each filled with the background and with guards around it.
  [[nodiscard]] Objects objects(std::span<const std::size_t> sizes) {
    const std::size_t size = Objects::footprint(sizes);
    if (size > local_.size() - local_used_) {
      throw std::length_error("the local region of " + id_ + " is used up");
    }
    Objects result(local_.subspan(local_used_), sizes);
    local_used_ += size;
    return result;
  }
  [[nodiscard]] Objects objects(std::initializer_list<std::size_t> sizes) {
    return objects(std::span<const std::size_t>(sizes.begin(), sizes.size()));
  }
  [[nodiscard]] Objects objects(std::size_t count, std::size_t size) {
    return objects(std::vector<std::size_t>(count, size));
  }
  /// Gives all local objects up.
  void reuse_local_memory() { local_used_ = 0; }

  /// Holds the channel's executor up. Only if `NodeSpec::pausable`.
  void pause(std::chrono::milliseconds limit) { executor_->pause(limit); }
  void resume() {
    if (executor_ != nullptr) {
      executor_->resume();
    }
  }

 private:
  struct Memory {
    std::shared_ptr<std::byte> data;
    std::size_t size;
    std::size_t page_size;

    [[nodiscard]] MutableBuffer span() const { return {data.get(), size}; }
  };

  void add_region(ChannelOptions& options, const RegionSpec& spec) {
    const std::size_t size = spec.pages * spec.page_size;
    memory_.push_back({allocate_(size), size, spec.page_size});
    fill_constant(memory_.back().span(), background);
    options.regions.push_back({memory_.back().data.get(), size, spec.page_size, spec.access});
  }

  std::string id_;
  Allocate allocate_;
  std::vector<Memory> memory_;
  MutableBuffer local_;
  std::size_t local_used_ = 0;
  std::unique_ptr<PausableExecutor> executor_;
  std::unique_ptr<BaseTransferChannel> channel_;
};

}  // namespace kvferry::testing
