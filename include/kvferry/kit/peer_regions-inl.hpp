// SPDX-License-Identifier: Apache-2.0
#pragma once

// The regions of peers, which come and go while there is a link. A peer tells of its new regions ahead of what it says
// later on the same connection; a number that came by another road, and is not known yet, is asked for: when the peer has
// answered, its news are here.
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void PeerDirectory::tell_of_regions() {
  if (const auto links = all_links()) {
    for (const auto& [peer_id, link] : *links) {
      link->region_added();
    }
  }
}

KVFERRY_INLINE bool PeerDirectory::region_added(const std::string& peer_id, const Host& host,
                                                const RemoteRegion& region) {
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  if (it == peers_.end() || it->second.host != &host) {
    return true;  // of a link that has been replaced
  }
  Peer& peer = it->second;
  if (region.number < peer.description->next_region) {
    return true;  // heard on another connection of the link
  }
  if (peer.description->regions.size() >= RegionTable::max_regions) {
    return false;
  }
  auto changed = std::make_shared<PeerDescription>(*peer.description);
  changed->regions.push_back(region);
  changed->next_region = region.number + 1;
  peer.description = std::move(changed);
  return true;
}

KVFERRY_INLINE void PeerDirectory::region_removed(const std::string& peer_id, const Host& host, std::uint32_t number) {
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  if (it == peers_.end() || it->second.host != &host) {
    return;
  }
  Peer& peer = it->second;
  if (number < peer.description->next_region && find_region(peer.description->regions, number) == nullptr) {
    return;
  }
  auto changed = std::make_shared<PeerDescription>(*peer.description);
  std::erase_if(changed->regions, [&](const RemoteRegion& region) { return region.number == number; });
  changed->next_region = std::max(changed->next_region, number + 1);
  peer.description = std::move(changed);
}

/// One question at a time; operations that come while it is under way share the next one.
KVFERRY_INLINE void PeerDirectory::ask_for_regions(const std::shared_ptr<Operation>& operation,
                                                   const std::shared_ptr<Link>& link) {
  const std::string& peer_id = operation->request().peer_id;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (closed_ || it == peers_.end()) {
      return;  // the operation has been asked to stop
    }
    Peer& peer = it->second;
    if (peer.link != link) {
      route_later({operation}, Routed::has_waited);
      return;
    }
    if (peer.asks_regions) {
      peer.next_region_askers.push_back(operation);
      return;
    }
    peer.asks_regions = true;
    peer.region_askers.push_back(operation);
  }
  link->ask_regions([weak = weak_from_this(), peer_id, asked = link.get()] {
    // Not by the thread that tells: it holds the link.
    if (const auto self = weak.lock()) {
      self->deadlines_->add(Clock::now(), std::make_shared<Expiry>([weak, peer_id, asked] {
                              if (const Visit visit(weak); visit) {
                                visit->regions_known(peer_id, asked);
                              }
                            }));
    }
  });
}

KVFERRY_INLINE void PeerDirectory::regions_known(const std::string& peer_id, const Link* link) {
  std::vector<std::shared_ptr<Operation>> known;
  std::vector<std::shared_ptr<Operation>> next;
  std::shared_ptr<Link> current;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.link.get() != link) {
      return;
    }
    Peer& peer = it->second;
    known = std::exchange(peer.region_askers, {});
    next = std::exchange(peer.next_region_askers, {});
    peer.asks_regions = false;
    current = peer.link;
  }
  for (const auto& operation : known) {
    route(operation, Routed::has_asked);
  }
  for (const auto& operation : next) {
    if (!operation->finished()) {
      ask_for_regions(operation, current);
    }
  }
}

KVFERRY_INLINE std::vector<std::shared_ptr<Operation>> PeerDirectory::take_askers(Peer& peer) {
  auto askers = std::exchange(peer.region_askers, {});
  for (auto& operation : std::exchange(peer.next_region_askers, {})) {
    askers.push_back(std::move(operation));
  }
  peer.asks_regions = false;
  return askers;
}

KVFERRY_INLINE void PeerDirectory::route_later(std::vector<std::shared_ptr<Operation>> operations, Routed how) {
  if (!operations.empty()) {
    deadlines_->add(Clock::now(),
                    std::make_shared<Expiry>([weak = weak_from_this(), operations = std::move(operations), how] {
                      for (const auto& operation : operations) {
                        if (const Visit self(weak); self) {
                          self->route(operation, how);
                        }
                      }
                    }));
  }
}

}  // namespace kvferry::kit
