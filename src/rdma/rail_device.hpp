// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <kvferry/rdma_transfer_channel.hpp>

#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// A port's addresses at this moment.
struct PortAddress {
  bool active = false;
  bool ethernet = false;
  bool needs_global_route = false;  ///< A virtual port of InfiniBand, which shares its LID with others.
  std::uint16_t lid = 0;
  ibv_mtu mtu = IBV_MTU_1024;
  std::uint32_t max_message = 0;
  std::uint32_t gid_index = 0;
  ibv_gid gid{};
  ibv_gid_type gid_type = IBV_GID_TYPE_IB;
};

/// The requests that were still with the adapter whenever a list completed and more was to be posted.
class WindowCounters {
 public:
  /// @param used the share of the window.
  void note(double used) noexcept {
    lists_.fetch_add(1, std::memory_order_relaxed);
    drained_.fetch_add(used == 0 ? 1 : 0, std::memory_order_relaxed);
    millionths_.fetch_add(static_cast<std::uint64_t>(used * 1e6), std::memory_order_relaxed);
  }
  [[nodiscard]] RdmaWindow counted() const noexcept {
    const std::uint64_t lists = lists_.load(std::memory_order_relaxed);
    return {lists, drained_.load(std::memory_order_relaxed),
            lists == 0
                ? 0
                : static_cast<double>(millionths_.load(std::memory_order_relaxed)) / 1e6 / static_cast<double>(lists)};
  }

 private:
  std::atomic<std::uint64_t> lists_{0};
  std::atomic<std::uint64_t> drained_{0};
  std::atomic<std::uint64_t> millionths_{0};
};

/// One port of a device, opened for a channel.
class RailDevice {
 public:
  /// @param preferred_host an address of this host, by which the GID may be chosen.
  /// @throws TransferError naming the device.
  RailDevice(RdmaRail rail, std::string preferred_host);
  RailDevice(const RailDevice&) = delete;
  RailDevice& operator=(const RailDevice&) = delete;

  [[nodiscard]] const std::string& name() const noexcept { return rail_.device; }
  [[nodiscard]] std::uint8_t port() const noexcept { return rail_.port; }
  [[nodiscard]] ibv_context* context() const noexcept { return context_.get(); }
  [[nodiscard]] const ibv_device_attr& limits() const noexcept { return limits_; }

  /// The port's present state: links go down and up, addresses change. @throws TransferError if the requested GID
  /// doesn't exist.
  [[nodiscard]] PortAddress address() const;
  /// The present place of the rail's partition in the port's table. @throws TransferError if it isn't there.
  [[nodiscard]] std::uint16_t partition_index() const;

  /// The device's interrupt for the next completion queue: each in turn, so that no CPU gets all of them.
  [[nodiscard]] int next_completion_vector() noexcept {
    const int count = std::max(context_->num_comp_vectors, 1);
    return static_cast<int>(completion_queues_++ % static_cast<unsigned>(count));
  }

  std::atomic<std::uint64_t> bytes_written{0};
  std::atomic<std::uint64_t> bytes_read{0};
  WindowCounters window;

 private:
  const RdmaRail rail_;
  const std::string preferred_host_;
  ContextPtr context_;
  ibv_device_attr limits_{};
  std::atomic<unsigned> completion_queues_{0};
};

/// The default rail: on the device that has `host`'s address, else the first active one.
/// @throws TransferError ENODEV.
[[nodiscard]] RdmaRail default_rail(const std::string& host);
[[nodiscard]] std::vector<RdmaRail> active_rails();

}  // namespace kvferry::rdma
