// SPDX-License-Identifier: Apache-2.0
#pragma once

// The facts about peers, for callers.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/url.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE PeerInfo PeerDirectory::describe(const Peer& peer) {
  return {peer.id, peer.description->incarnation, peer.url, peer.description->regions, {}};
}

KVFERRY_INLINE std::optional<PeerInfo> PeerDirectory::info(std::string_view peer_id) const {
  std::shared_ptr<Link> link;
  PeerInfo info;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || !it->second.link) {
      return std::nullopt;
    }
    link = it->second.link;
    info = describe(it->second);
  }
  info.path = link->path_with_remark();
  return info;
}

KVFERRY_INLINE std::vector<PeerInfo> PeerDirectory::infos() const {
  std::vector<PeerInfo> infos;
  std::vector<std::shared_ptr<Link>> links;
  {
    const Lock lock(mutex_);
    for (const auto& [id, peer] : peers_) {
      if (peer.link) {
        infos.push_back(describe(peer));
        links.push_back(peer.link);
      }
    }
  }
  for (std::size_t i = 0; i < links.size(); ++i) {
    infos[i].path = links[i]->path_with_remark();
  }
  return infos;
}

KVFERRY_INLINE std::optional<std::vector<std::pair<std::string, std::shared_ptr<Link>>>> PeerDirectory::all_links()
    const {
  std::vector<std::pair<std::string, std::shared_ptr<Link>>> links;
  const Lock lock(mutex_);
  if (closed_) {
    return std::nullopt;
  }
  for (const Published& published : links_) {
    if (auto link = published.link.lock()) {
      links.emplace_back(published.peer_id, std::move(link));
    }
  }
  return links;
}

KVFERRY_INLINE std::shared_ptr<Link> PeerDirectory::link(std::string_view peer_id) const {
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  return it == peers_.end() ? nullptr : it->second.link;
}

KVFERRY_INLINE std::string PeerDirectory::reached_url(std::string_view peer_id, const std::string& url) const {
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  return it == peers_.end() ? url : it->second.reached(url);
}

KVFERRY_INLINE std::string PeerDirectory::awaited(std::string_view peer_id) { return awaited(peer_id, {}); }

KVFERRY_INLINE std::string PeerDirectory::awaited(std::string_view peer_id, std::optional<std::uint64_t> number) {
  std::optional<Stay> stay;  // the transport is asked, which `close` waits for
  std::shared_ptr<Dial> dial;
  std::string before;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (closed_ || it == peers_.end()) {
      return {};
    }
    const Peer& peer = it->second;
    const Attempt& attempt = peer.attempt;
    if (!number && attempt.number == 0) {
      return Clock::now() < peer.last_awaited_until ? peer.last_awaited : std::string();
    }
    if (attempt.accepting || attempt.yielded || (number && *number != attempt.number)) {
      return "the peer's own connection has not come";
    }
    if (attempt.let_go) {
      return awaited_of_one_let_go(attempt);
    }
    if (!attempt.let_go_because.empty()) {
      before = "; before that: " + attempt.let_go_because;
    }
    if (attempt.instance.incarnation == 0) {
      return "no answer from " + printable(attempt.url) + before;
    }
    stay.emplace(*this);
    dial = attempt.dial;
  }
  const std::string at = dial ? dial->awaited() : std::string();
  return "the data connection was not welcomed" + (at.empty() ? at : ": " + at) + before;
}

KVFERRY_INLINE bool PeerDirectory::usable(std::string_view peer_id) const { return link(peer_id) != nullptr; }

KVFERRY_INLINE HandshakeStats PeerDirectory::handshakes() const {
  HandshakeStats stats;
  stats.dialed = dialed_;
  stats.accepted = accepted_;
  stats.reconnected = reconnected_;
  stats.failed = failed_dials_.snapshot();
  stats.refused = refused_.snapshot();
  return stats;
}

KVFERRY_INLINE std::vector<PeerStats> PeerDirectory::peers() const {
  std::vector<PeerStats> all;
  const Lock lock(mutex_);
  for (const auto& [id, peer] : peers_) {
    if (peer.description) {
      const PeerCounters& counters = *peer.counters;
      all.push_back({id, peer.link != nullptr, counters.connects, counters.succeeded, counters.failed, counters.bytes});
    }
  }
  return all;
}

KVFERRY_INLINE std::size_t PeerDirectory::usable_count() const {
  const Lock lock(mutex_);
  return static_cast<std::size_t>(
      std::ranges::count_if(peers_, [](const auto& entry) { return entry.second.link != nullptr; }));
}

}  // namespace kvferry::kit
