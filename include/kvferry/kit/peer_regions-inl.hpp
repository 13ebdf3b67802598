// SPDX-License-Identifier: Apache-2.0
#pragma once

// The regions of peers, which come and go while there is a link. A peer tells of its new regions ahead of what it says
// later on the same connection; a number that came by another road, and is not known yet, is asked for: when the peer has
// answered, its news are here.
#include <algorithm>
#include <chrono>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Then a question that has no answer counts as lost.
inline constexpr std::chrono::seconds patience_for_regions{1};

}  // namespace internal

/// Never fails: where memory is used up the peer hears of it with the next news, or when it asks.
KVFERRY_INLINE void PeerDirectory::tell_of_regions() noexcept {
  try {
    if (const auto links = all_links()) {
      for (const auto& [peer_id, link] : *links) {
        try {
          link->region_added();
        } catch (...) {
          detail::log_exception("telling a peer of a region");  // the others are told all the same
        }
      }
    }
  } catch (...) {
    detail::log_exception("telling peers of a region");
  }
}

/// A peer may send news without end, and its list may be long: no copy is made, and none let go, with the lock held.
template <class Change>
bool PeerDirectory::change_regions(const std::string& peer_id, const Host& host, Change change) {
  std::shared_ptr<const PeerDescription> seen;
  for (;;) {
    std::shared_ptr<const PeerDescription> changed;
    if (seen) {
      auto made = std::make_shared<PeerDescription>(*seen);
      const auto becomes = change(*made);
      if (becomes != News::heard_of) {
        return becomes == News::old;
      }
      changed = std::move(made);
    }
    std::shared_ptr<const PeerDescription> old;
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.host != &host) {
      return true;  // of a link that has been replaced
    }
    if (changed && it->second.description == seen) {
      it->second.description = std::move(changed);
      return true;
    }
    old = std::exchange(seen, it->second.description);  // heard meanwhile on another connection of the link
  }
}

KVFERRY_INLINE bool PeerDirectory::region_added(const std::string& peer_id, const Host& host,
                                                const RemoteRegion& region) {
  return change_regions(peer_id, host, [&](PeerDescription& description) {
    if (region.number < description.next_region) {
      return News::old;  // heard on another connection of the link
    }
    if (description.regions.size() >= RegionTable::max_regions) {
      return News::too_many;
    }
    description.regions.push_back(region);
    description.next_region = region.number + 1;
    return News::heard_of;
  });
}

KVFERRY_INLINE void PeerDirectory::region_removed(const std::string& peer_id, const Host& host, std::uint32_t number) {
  (void)change_regions(peer_id, host, [&](PeerDescription& description) {
    if (number < description.next_region && find_region(description.regions, number) == nullptr) {
      return News::old;
    }
    std::erase_if(description.regions, [&](const RemoteRegion& region) { return region.number == number; });
    description.next_region = std::max(description.next_region, number + 1);
    return News::heard_of;
  });
}

/// One question at a time; operations that come while it is under way share the next one. A link whose peer is silent may
/// have dropped the question: after a while there is another one.
KVFERRY_INLINE void PeerDirectory::ask_for_regions(const std::shared_ptr<Operation>& operation,
                                                   const std::shared_ptr<Link>& link) {
  constexpr std::size_t clearing_interval = 64;
  const std::string& peer_id = operation->request().peer_id;
  std::uint64_t question = 0;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (closed_ || it == peers_.end()) {
      return;  // the operation has been asked to stop
    }
    Peer& peer = it->second;
    if (peer.link != link) {
      route_later({{operation}}, Routed::has_waited);
      return;
    }
    // Questions that have ended by themselves, not to pile up while a peer is silent.
    if (peer.region_askers.size() % clearing_interval == clearing_interval - 1) {
      std::erase_if(peer.region_askers, [](const auto& asker) { return asker.operation->finished(); });
    }
    const bool waits = peer.asks_regions && Clock::now() - peer.asked_regions_at < patience_for_regions;
    peer.region_askers.push_back({operation, peer.region_question + 1});
    if (waits) {
      return;
    }
    question = begin_region_question(peer);
  }
  ask_for_regions(peer_id, link, question);
}

KVFERRY_INLINE std::uint64_t PeerDirectory::begin_region_question(Peer& peer) {
  peer.asks_regions = true;
  peer.asked_regions_at = Clock::now();
  return ++peer.region_question;
}

KVFERRY_INLINE void PeerDirectory::ask_for_regions(const std::string& peer_id, const std::shared_ptr<Link>& link,
                                                   std::uint64_t question) {
  link->ask_regions([weak = weak_from_this(), peer_id, asked = std::weak_ptr(link), question] {
    // Not by the thread that tells: it holds the link.
    if (const auto self = weak.lock()) {
      self->deadlines_->add(Clock::now(), Expiry::make([weak, peer_id, asked, question] {
                              if (const Visit visit(weak); visit) {
                                visit->regions_known(peer_id, asked, question);
                              }
                            }));
    }
  });
}

KVFERRY_INLINE void PeerDirectory::regions_known(const std::string& peer_id, const std::weak_ptr<Link>& asked,
                                                 std::uint64_t question) {
  std::vector<std::shared_ptr<Operation>> known;
  const auto link = asked.lock();
  std::uint64_t next = 0;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (!link || it == peers_.end() || it->second.link != link) {
      return;
    }
    Peer& peer = it->second;
    std::erase_if(peer.region_askers, [&](RegionAsker& asker) {
      const bool has_heard = asker.question <= question;
      if (has_heard) {
        known.push_back(std::move(asker.operation));
      }
      return has_heard;
    });
    if (peer.region_askers.empty()) {
      peer.asks_regions = false;
    } else {
      next = begin_region_question(peer);
    }
  }
  for (const auto& operation : known) {
    route(operation, Routed::has_asked);
  }
  if (next != 0) {
    ask_for_regions(peer_id, link, next);
  }
}

KVFERRY_INLINE std::vector<PeerDirectory::RegionAsker> PeerDirectory::take_askers(Peer& peer) noexcept {
  peer.asks_regions = false;
  return std::exchange(peer.region_askers, {});
}

KVFERRY_INLINE void PeerDirectory::route_later(std::vector<RegionAsker> askers, Routed how) {
  if (!askers.empty()) {
    deadlines_->add(Clock::now(), Expiry::make([weak = weak_from_this(), askers = std::move(askers), how] {
                      for (const RegionAsker& asker : askers) {
                        if (const Visit self(weak); self) {
                          self->route(asker.operation, how);
                        }
                      }
                    }));
  }
}

}  // namespace kvferry::kit
