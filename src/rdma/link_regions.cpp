// SPDX-License-Identifier: Apache-2.0
#include "link_regions.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

LinkRegions::LinkRegions(std::vector<std::uint64_t> rails, OwnKeys own_keys, std::vector<PeerRegion> peers,
                         std::uint32_t next)
    : rails_(std::move(rails)), own_keys_(std::move(own_keys)), next_(next) {
  std::vector<std::shared_ptr<const PeerRegion>> regions;
  regions.reserve(peers.size());
  for (PeerRegion& region : peers) {
    regions.push_back(std::make_shared<const PeerRegion>(std::move(region)));
  }
  peers_ = std::make_shared<const PeerRegionList>(std::move(regions));
}

std::vector<PeerRegion> LinkRegions::told(std::span<const RemoteRegion> described,
                                          std::span<const RailEndpoint* const> peers) {
  std::vector<PeerRegion> regions;
  for (const RemoteRegion& region : described) {
    PeerRegion told{region.number, region.page_size, {}, region.access};
    for (const RailEndpoint* const rail : peers) {
      const auto keys = std::ranges::find(rail->regions, std::uint64_t{region.number}, &RegionKeys::number);
      if (keys != rail->regions.end()) {
        told.keys.push_back(*keys);
      }
    }
    // One without keys has been removed since it was described.
    if (told.keys.size() == peers.size()) {
      regions.push_back(std::move(told));
    }
  }
  return regions;
}

bool LinkRegions::enter(PeerRegion region) {
  if (region.number < next_) {
    return false;
  }
  const std::uint32_t next = region.number + 1;
  auto regions = peers_->all();
  regions.push_back(std::make_shared<const PeerRegion>(std::move(region)));
  replace(std::move(regions));
  next_ = next;
  return true;
}

void LinkRegions::remove(std::uint32_t number) {
  const std::lock_guard lock(mutex_);
  if (peers_->find(number) != nullptr) {
    auto regions = peers_->all();
    std::erase_if(regions, [&](const auto& region) { return region->number == number; });
    replace(std::move(regions));
  }
  next_ = std::max(next_, number + 1);
}

void LinkRegions::replace(std::vector<std::shared_ptr<const PeerRegion>> regions) {
  const auto old = std::exchange(peers_, std::make_shared<const PeerRegionList>(std::move(regions)));
  old->outdate();
}

}  // namespace kvferry::rdma
