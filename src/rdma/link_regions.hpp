// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "endpoint.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// A region of the peer, whether or not this side may reach it.
struct PeerRegion {
  std::uint32_t number = 0;
  std::uint64_t page_size = 0;
  std::vector<RegionKeys> keys;  ///< One for each rail of the link, in the order of the rails' numbers.
  Access access = Access::read_write;
};

/// An immutable snapshot of the peer's regions. When the regions change, there is a new list, and this one is marked as
/// outdated.
class PeerRegionList {
 public:
  explicit PeerRegionList(std::vector<std::shared_ptr<const PeerRegion>> regions) : regions_(std::move(regions)) {}

  [[nodiscard]] const std::vector<std::shared_ptr<const PeerRegion>>& all() const noexcept { return regions_; }
  /// @return null if there is none.
  [[nodiscard]] const PeerRegion* find(std::uint32_t number) const noexcept {
    // As long as none has been removed the number is the place.
    if (number < regions_.size() && regions_[number]->number == number) {
      return regions_[number].get();
    }
    const auto it = std::ranges::lower_bound(regions_, number, {}, [](const auto& region) { return region->number; });
    return it != regions_.end() && (*it)->number == number ? it->get() : nullptr;
  }

  [[nodiscard]] bool outdated() const noexcept { return outdated_.load(std::memory_order_acquire); }
  void outdate() const noexcept { outdated_.store(true, std::memory_order_release); }

 private:
  const std::vector<std::shared_ptr<const PeerRegion>> regions_;  ///< By their numbers.
  mutable std::atomic<bool> outdated_{false};
};

/// The regions of a link's two sides, for all of its rails. An announcement on one rail has the keys for all rails, so
/// no rail waits for another. Thread-safe.
class LinkRegions {
 public:
  /// The keys of a region of this side, on the rail at this place of the link; nothing if it isn't registered any more.
  using OwnKeys = std::function<std::optional<RegionKeys>(std::size_t place, std::uint32_t number)>;

  /// @param rails their numbers, rising. @param next of smaller numbers that aren't there, the peer's regions are gone.
  LinkRegions(std::vector<std::uint64_t> rails, OwnKeys own_keys, std::vector<PeerRegion> peers, std::uint32_t next);

  /// @param peers the rails of the peer's endpoint that are joined; of what has been checked.
  [[nodiscard]] static std::vector<PeerRegion> told(std::span<const RemoteRegion> described,
                                                    std::span<const RailEndpoint* const> peers);

  [[nodiscard]] const std::vector<std::uint64_t>& rails() const noexcept { return rails_; }
  [[nodiscard]] std::optional<RegionKeys> own_keys(std::size_t place, std::uint32_t number) const {
    return own_keys_(place, number);
  }

  /// Never null.
  [[nodiscard]] std::shared_ptr<const PeerRegionList> peers() const {
    const std::lock_guard lock(mutex_);
    return peers_;
  }
  /// Where each of the peer's regions begins in its memory, as of now; 0 for those that are closed or gone.
  [[nodiscard]] std::function<std::uint64_t(std::uint32_t)> addresses_of_peers() const {
    return [peers = peers()](std::uint32_t number) -> std::uint64_t {
      const PeerRegion* const region = peers->find(number);
      return region == nullptr || region->keys.empty() ? 0 : region->keys.front().address;
    };
  }
  /// Enters a region. Does nothing if another rail has announced it before.
  /// @param tell reports the region, and returns whether there may be so many. It takes no lock with which this is
  ///   called.
  /// @return the result of `tell`, or true.
  template <class Tell>
  [[nodiscard]] bool add(PeerRegion region, Tell tell) {
    const std::lock_guard lock(mutex_);
    return !enter(std::move(region)) || tell();
  }
  void remove(std::uint32_t number);

 private:
  [[nodiscard]] bool enter(PeerRegion region);
  void replace(std::vector<std::shared_ptr<const PeerRegion>> regions);

  const std::vector<std::uint64_t> rails_;
  const OwnKeys own_keys_;
  mutable std::mutex mutex_;
  std::shared_ptr<const PeerRegionList> peers_;
  std::uint32_t next_;
};

}  // namespace kvferry::rdma
