// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/rdma_transfer_channel.hpp>

#include "endpoint.hpp"
#include "registered_buffer.hpp"
#include "slice_table.hpp"
#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// A port's addresses at this moment.
struct PortAddress {
  bool active = false;
  bool ethernet = false;
  std::uint16_t lid = 0;
  ibv_mtu mtu = IBV_MTU_1024;
  std::uint32_t max_message = 0;
  std::uint32_t gid_index = 0;
  ibv_gid gid{};
  ibv_gid_type gid_type = IBV_GID_TYPE_IB;
};

/// One port of a device, opened for a channel, with the channel's regions registered there.
class RailDevice {
 public:
  /// @param preferred_host an address of this host, by which the GID may be chosen.
  /// @throws TransferError naming the device, or the region that can't be registered.
  RailDevice(RdmaRail rail, std::string preferred_host, std::span<const MemoryRegion> regions, std::size_t slice_bytes);
  RailDevice(const RailDevice&) = delete;
  RailDevice& operator=(const RailDevice&) = delete;

  [[nodiscard]] const std::string& name() const noexcept { return rail_.device; }
  [[nodiscard]] std::uint8_t port() const noexcept { return rail_.port; }
  [[nodiscard]] ibv_context* context() const noexcept { return context_.get(); }
  [[nodiscard]] ibv_pd* domain() const noexcept { return domain_.get(); }
  [[nodiscard]] const ibv_device_attr& limits() const noexcept { return limits_; }

  /// The port's present state: links go down and up, addresses change. @throws TransferError if the requested GID
  /// doesn't exist.
  [[nodiscard]] PortAddress address() const;
  /// The present place of the rail's partition in the port's table. @throws TransferError if it isn't there.
  [[nodiscard]] std::uint16_t partition_index() const;

  /// The memory of the channel's regions and its keys, for an operation that begins now. Regions that are being removed
  /// are not there, although they are still registered. An operation keeps its table.
  /// @param now returns the channel's present regions; called if they have changed since the last call.
  template <class Now>
  [[nodiscard]] std::shared_ptr<const SliceTable> regions(Now now) {
    const std::lock_guard lock(regions_mutex_);
    if (known_ == nullptr || known_->outdated()) {
      list_regions(now());
    }
    return slices_;
  }
  /// Of all that are registered, ordered by number. Thread-safe, as the following.
  [[nodiscard]] std::vector<RegionKeys> region_keys() const;
  [[nodiscard]] std::optional<RegionKeys> keys_of(std::uint32_t number) const;
  /// @throws TransferError naming the region; `errc::resource_limit` if it has more slices than a message holds keys.
  void register_region(const LocalRegion& region);
  /// Call it when no queue pair can reach the region, and no operation uses it.
  void deregister_region(std::uint32_t number);
  /// Call it when no queue pair is left.
  void deregister_regions();

  /// A piece of registered memory to copy through; given back when it is destroyed.
  class StagingBlock;
  /// @return nothing if `bytes` are more than a block has, or all blocks are in use.
  [[nodiscard]] std::unique_ptr<StagingBlock> take_staging_block(std::size_t bytes);

  /// The device's interrupt for the next completion queue: each in turn, so that no CPU gets all of them.
  [[nodiscard]] int next_completion_vector() noexcept {
    const int count = std::max(context_->num_comp_vectors, 1);
    return static_cast<int>(completion_queues_++ % static_cast<unsigned>(count));
  }

  std::atomic<std::uint64_t> bytes_written{0};
  std::atomic<std::uint64_t> bytes_read{0};

 private:
  struct Registered {
    std::vector<MemoryRegionPtr> memory;
    std::vector<Slice> slices;
    RegionKeys keys;
  };
  [[nodiscard]] Registered make_registered(const LocalRegion& region) const;
  void enter(std::uint32_t number, Registered registered);
  /// With the lock held.
  void list_regions(std::shared_ptr<const kit::RegionList> now);

  const RdmaRail rail_;
  const std::string preferred_host_;
  const std::size_t slice_bytes_;
  ContextPtr context_;
  DomainPtr domain_;
  ibv_device_attr limits_{};

  mutable std::mutex regions_mutex_;  ///< Guards the following.
  std::map<std::uint32_t, Registered> registered_;
  std::shared_ptr<const kit::RegionList> known_;  ///< `slices_` is of these.
  std::shared_ptr<const SliceTable> slices_;

  std::atomic<unsigned> completion_queues_{0};
  std::mutex staging_mutex_;
  RegisteredBuffer staging_;
  std::vector<std::size_t> free_blocks_;
  bool staging_made_ = false;
};

class RailDevice::StagingBlock {
 public:
  StagingBlock(RailDevice& device, std::size_t number) : device_(device), number_(number) {}
  StagingBlock(const StagingBlock&) = delete;
  StagingBlock& operator=(const StagingBlock&) = delete;
  ~StagingBlock();

  static constexpr std::size_t size = std::size_t{64} << 10;
  [[nodiscard]] std::byte* data() const noexcept { return device_.staging_.data() + number_ * size; }
  [[nodiscard]] std::uint32_t local_key() const noexcept { return device_.staging_.local_key(); }

 private:
  RailDevice& device_;
  const std::size_t number_;
};

/// The default rail: on the device that has `host`'s address, else the first active one.
/// @throws TransferError ENODEV.
[[nodiscard]] RdmaRail default_rail(const std::string& host);
[[nodiscard]] std::vector<RdmaRail> active_rails();

}  // namespace kvferry::rdma
