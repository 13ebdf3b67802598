// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>

#include "endpoint.hpp"
#include "rail_device.hpp"
#include "registered_buffer.hpp"
#include "slice_table.hpp"
#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

class RailDomains;

/// How regions are registered.
struct RegistrationOptions {
  std::size_t slice_bytes = std::size_t{1} << 30;
  bool relaxed_ordering = false;
  std::size_t threads = 1;  ///< At a time, for large ones.

  static constexpr std::size_t large = std::size_t{64} << 20;
};

/// One of the channel's regions on a rail. Each of its registrations keeps it; so it is gone when none is left.
class ChannelRegion {
 public:
  /// @param gone set when this is destroyed.
  ChannelRegion(const LocalRegion& region, std::promise<void> gone) : region_(region), gone_(std::move(gone)) {}
  ChannelRegion(const ChannelRegion&) = delete;
  ChannelRegion& operator=(const ChannelRegion&) = delete;
  ~ChannelRegion() { gone_.set_value(); }

  /// Has it registered by a descriptor of its own, because the caller may close his. @throws TransferError naming the region.
  void keep_dmabuf();
  [[nodiscard]] const LocalRegion& get() const noexcept { return region_; }

 private:
  LocalRegion region_;
  Descriptor dmabuf_;
  std::promise<void> gone_;
};

/// A protection domain of a rail's device, with the channel's regions registered there. A queue pair reaches what is
/// registered in its own domain, and a key from any other domain opens nothing to it.
class RailDomain {
 public:
  enum class Use : std::uint8_t {
    of_channel,  ///< By the queue pairs of all peers.
    of_link,     ///< By the queue pairs that a link has on the rail: see `RdmaOptions::isolate_peers`.
  };
  /// Without regions. @throws TransferError naming the device.
  RailDomain(std::shared_ptr<RailDevice> device, const RegistrationOptions& options, Use use);
  RailDomain(const RailDomain&) = delete;
  RailDomain& operator=(const RailDomain&) = delete;

  [[nodiscard]] RailDevice& device() const noexcept { return *device_; }
  [[nodiscard]] ibv_pd* handle() const noexcept { return domain_.get(); }

  /// The memory of the channel's regions and its keys, for an operation that begins now: without regions that are on their
  /// way out, though they are registered still. An operation keeps what it has got.
  /// @param now called for the channel's regions at this moment, if they aren't those of the last call.
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

  /// The queue pairs of the link that has this domain are gone: its regions' registrations go as well, those included that others
  /// are making or ending at this moment. None is left when this returns. Keys and addresses stay known, for who finds out later
  /// than this. Does nothing to the domain of all peers.
  void link_ended();
  /// The same of either. To be called when no queue pair is left.
  void deregister_regions();

  /// A piece of registered memory to copy through; given back when it is destroyed.
  class StagingBlock;
  /// @return nothing if `bytes` are more than a block has, or all blocks are in use.
  [[nodiscard]] std::unique_ptr<StagingBlock> take_staging_block(std::size_t bytes);

 private:
  friend RailDomains;
  struct Registered {
    struct Memory {
      std::shared_ptr<const ChannelRegion> region;  ///< Let go of when the following are registered no more.
      std::vector<MemoryRegionPtr> slices;
    };
    Memory memory;
    std::vector<Slice> slices;
    RegionKeys keys;
  };
  /// @param threads for its slices. @throws TransferError naming the region.
  [[nodiscard]] Registered make_registered(const std::shared_ptr<const ChannelRegion>& of, std::size_t threads) const;
  [[nodiscard]] MemoryRegionPtr register_slice(const LocalRegion& region, std::size_t begin, std::size_t size,
                                               int access) const;
  /// Takes it unless the domain has ended, or has a region of this number.
  void enter(std::uint32_t number, Registered&& registered);
  void deregister_region(std::uint32_t number);
  [[nodiscard]] bool ended() const;
  /// With the lock held.
  void list_regions(std::shared_ptr<const kit::RegionList> now);

  const std::shared_ptr<RailDevice> device_;
  const RegistrationOptions options_;
  const Use use_;
  DomainPtr domain_;

  std::shared_mutex at_work_;         ///< Shared while one region is registered or deregistered; alone while all are.
  mutable std::mutex regions_mutex_;  ///< Guards the following.
  std::map<std::uint32_t, Registered> registered_;
  bool ended_ = false;
  std::shared_ptr<const kit::RegionList> known_;  ///< `slices_` is of these.
  std::shared_ptr<const SliceTable> slices_;

  std::mutex staging_mutex_;
  RegisteredBuffer staging_;
  std::vector<std::size_t> free_blocks_;
  bool staging_made_ = false;
};

class RailDomain::StagingBlock {
 public:
  StagingBlock(RailDomain& domain, std::size_t number) : domain_(domain), number_(number) {}
  StagingBlock(const StagingBlock&) = delete;
  StagingBlock& operator=(const StagingBlock&) = delete;
  ~StagingBlock();

  static constexpr std::size_t size = std::size_t{64} << 10;
  [[nodiscard]] std::byte* data() const noexcept { return domain_.staging_.data() + number_ * size; }
  [[nodiscard]] std::uint32_t local_key() const noexcept { return domain_.staging_.local_key(); }

 private:
  RailDomain& domain_;
  const std::size_t number_;
};

/// A rail's protection domains: one for all links, or one for each. Thread-safe.
class RailDomains {
 public:
  /// Registers the regions for all peers or, where each link has its own domain, tries whether they can be.
  /// @throws TransferError naming the device, or the region that can't be registered.
  RailDomains(std::shared_ptr<RailDevice> device, std::span<const MemoryRegion> regions,
              const RegistrationOptions& options, RailDomain::Use use);

  /// The domain of a link that is being made. @throws TransferError naming the region that can't be registered for it, and
  /// `errc::closed` after `close` where each link has its own.
  [[nodiscard]] std::shared_ptr<RailDomain> for_link();

  /// In all domains whose links haven't ended, or in none. One region at a time.
  /// @throws TransferError naming the region; `errc::resource_limit` if it has more slices than a message holds keys.
  void register_region(const LocalRegion& region);
  /// To be called when no queue pair can reach it, and no operation uses it. It is registered nowhere when this returns.
  void deregister_region(std::uint32_t number);
  /// To be called when no queue pair is left. No region is registered when this returns.
  void close();

 private:
  struct Known {
    std::shared_ptr<const ChannelRegion> region;  ///< Null once this is closed.
    std::shared_future<void> gone;
  };
  [[nodiscard]] Known make_known(const LocalRegion& region) const;
  /// With the lock held.
  [[nodiscard]] bool is_known(const std::shared_ptr<const ChannelRegion>& region) const;
  /// Registers it there, unless that link has ended or the region has been removed: then it doesn't matter if it can't be.
  /// @return whether it is registered there.
  bool register_in(RailDomain& domain, const std::shared_ptr<const ChannelRegion>& region, std::size_t threads);
  /// For so many bytes: to start one takes as long as to register some 100 KiB.
  [[nodiscard]] std::size_t threads_for(std::size_t bytes) const noexcept;
  /// The domains that live. With the lock held.
  [[nodiscard]] std::vector<std::shared_ptr<RailDomain>> living();

  const std::shared_ptr<RailDevice> device_;
  const RegistrationOptions options_;
  const RailDomain::Use use_;
  std::shared_ptr<RailDomain> common_;  ///< If it is for all links.

  std::mutex mutex_;  ///< Guards the following. Not held while anything is registered, which takes its time.
  std::map<std::uint32_t, Known> regions_;
  std::vector<std::weak_ptr<RailDomain>> domains_;
  bool closed_ = false;
};

}  // namespace kvferry::rdma
