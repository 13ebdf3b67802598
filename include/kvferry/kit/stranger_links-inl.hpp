// SPDX-License-Identifier: Apache-2.0
#pragma once

// Room for the links of peers that came by themselves.
#include <algorithm>
#include <utility>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Null if all are used, or there are none.
KVFERRY_INLINE const std::string* PeerDirectory::idle_link(const StrangerLinks::Ids& ids) {
  return stranger_links_.idle(ids, StrangerLinks::Clock::now(), [this](const std::string& id) {
    const auto it = peers_.find(id);
    return it == peers_.end() || !it->second.link || it->second.link->take_used();
  });
}

/// Whether a link of one descriptor of somebody who comes by himself would find room, or be given it.
KVFERRY_INLINE bool PeerDirectory::may_link(const std::string& source) {
  stranger_links_.raise(StrangerLinks::bounds(options_.max_peers));
  const auto* const greedy = stranger_links_.greedy(source, 1);
  return greedy == nullptr || idle_link(*greedy) != nullptr;
}

/// Enters a link that a peer has made by itself. @param displaced those that have to go for it, also if it can't be entered.
KVFERRY_INLINE bool PeerDirectory::enter_stranger(const Peer& peer, const std::string& source, const Link& link,
                                                  Displaced& displaced) {
  const auto seen_used = stranger_links_.seen_used(peer.id);
  stranger_links_.leave(peer.id);
  for (const auto* greedy = stranger_links_.greedy(source, link.descriptors()); greedy != nullptr;
       greedy = stranger_links_.greedy(source, link.descriptors())) {
    const auto* const idle = idle_link(*greedy);
    if (idle == nullptr) {
      if (peer.link) {
        stranger_links_.enter(peer.id, peer.description->source, peer.link->descriptors(), seen_used);
      }
      return false;
    }
    const std::string id = *idle;
    displaced.emplace_back(id, peers_.find(id)->second.link);
    stranger_links_.leave(id);
  }
  stranger_links_.enter(peer.id, source, link.descriptors());
  return true;
}

KVFERRY_INLINE void PeerDirectory::break_links(const Displaced& displaced) {
  for (const auto& [id, link] : displaced) {
    break_link(id, *link, errc::resource_limit, "newer connections have taken the place of one that was out of use");
  }
}

}  // namespace kvferry::kit
