// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/peer_directory.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/log.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/kit/pause.hpp>
#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_metadata.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Handshakes of ids that this channel doesn't know, at a time.
inline constexpr std::size_t max_attempts_of_strangers = 3072;

/// Has all links say at the same time what they owe to their peers.
KVFERRY_INLINE void take_leave(std::vector<std::shared_ptr<Link>> links) {
  while (!links.empty()) {
    std::vector<Link::Pause> pauses;
    std::erase_if(links, [&](const std::shared_ptr<Link>& link) {
      auto pause = link->take_leave();
      if (pause) {
        pauses.push_back(std::move(*pause));
      }
      return !pause;
    });
    if (!links.empty()) {
      wait_for(pauses);
    }
  }
}

}  // namespace internal

KVFERRY_INLINE PeerDirectory::PeerDirectory(
    const ChannelOptions& options, std::shared_ptr<RegionTable> regions, std::uint64_t incarnation,
    TransportHooks hooks, std::shared_ptr<DeadlineQueue> deadlines, std::shared_ptr<NotificationQueue> notifications,
    std::shared_ptr<PeerEvents> events, std::shared_ptr<OperationRegistry> operations, std::shared_ptr<Logger> logger)
    : options_(options),
      regions_(std::move(regions)),
      incarnation_(incarnation),
      hooks_(std::move(hooks)),
      deadlines_(std::move(deadlines)),
      notifications_(std::move(notifications)),
      events_(std::move(events)),
      operations_(std::move(operations)),
      posted_(std::make_shared<PostedMemory>(
          PostedMemory::Bounds{options.max_posted_recv_bytes, options.max_posted_recv_bytes_of_peer})),
      logger_(std::move(logger)),
      slots_(std::min(options.max_peers - options.max_peers / 4, max_attempts_of_strangers)),
      stranger_links_(StrangerLinks::bounds(options.max_peers)) {}

KVFERRY_INLINE PeerDirectory::~PeerDirectory() = default;

KVFERRY_INLINE void PeerDirectory::use(HandshakeService& service, std::string own_init_url) {
  const Lock lock(mutex_);
  service_ = &service;
  own_init_url_ = std::move(own_init_url);
}

KVFERRY_INLINE PeerDirectory::Peer* PeerDirectory::find_or_add(const std::string& peer_id, bool named) {
  if (const auto it = peers_.find(peer_id); it != peers_.end()) {
    it->second.named = it->second.named || named;
    if (named) {
      stranger_links_.leave(peer_id);
    }
    return &it->second;
  }
  const auto alike = [named](const auto& entry) { return entry.second.named == named; };
  if (peers_.size() >= options_.max_peers &&
      static_cast<std::size_t>(std::ranges::count_if(peers_, alike)) >= options_.max_peers) {
    // Of those that nobody uses, the one that has been so for longest makes room, and who was never connected before
    // all.
    const auto precedes = [](const Peer& one, const Peer& other) {
      return std::pair(one.description != nullptr, one.out_of_use_since) <
             std::pair(other.description != nullptr, other.out_of_use_since);
    };
    auto oldest = peers_.end();
    for (auto it = peers_.begin(); it != peers_.end(); ++it) {
      if (alike(*it) && !it->second.in_use() && (oldest == peers_.end() || precedes(it->second, oldest->second))) {
        oldest = it;
      }
    }
    if (oldest == peers_.end()) {
      return nullptr;
    }
    logger_->log(LogLevel::info, "peer_forgotten", oldest->first, errc::resource_limit, [&] {
      return "makes room for another: " + std::to_string(options_.max_peers) +
             " peers are known, and it was out of use";
    });
    fenced_forgotten_at_ = std::max(fenced_forgotten_at_, oldest->second.fenced_at);
    peers_.erase(oldest);
  }
  Peer peer;
  peer.id = peer_id;
  peer.fenced_at = fenced_forgotten_at_;
  peer.named = named;
  return &peers_.emplace(peer_id, std::move(peer)).first->second;
}

KVFERRY_INLINE void PeerDirectory::wait(Peer& peer, Waiter waiter, Lock& lock) {
  if (waiter.over()) {
    return;  // on its way here: nobody is to be connected to for it
  }
  // Waits that have ended by themselves are cleared away now and then, not to pile up while an attempt takes long.
  constexpr std::size_t clearing_interval = 64;
  if (peer.waiting.size() % clearing_interval == clearing_interval - 1) {
    std::erase_if(peer.waiting, [](const Waiter& waiting) { return waiting.over(); });
  }
  // Once the time of those whom a dial was made for is over, there is no reason to wait for it. If the peer has answered, it may
  // have the connection already, and something under way on it.
  if (peer.dialing() && !peer.attempt.moves && !peer.attempt.peers_patience && !peer.attempt.host &&
      Clock::now() >= peer.attempt.deadline - longer_than_the_call) {
    end_attempt(peer.attempt);
  }
  peer.waiting.push_back(std::move(waiter));
  if (!peer.link && peer.attempt.number == 0 && !peer.url.empty()) {
    start_dial(peer, lock);
  } else {
    dial_beside_later(peer);
  }
}

KVFERRY_INLINE void PeerDirectory::connect(const std::string& local_id, const std::string& peer_id,
                                           const std::string& url, std::uint64_t incarnation, Waiter waiter) {
  Lock lock(mutex_);
  connect(local_id, peer_id, url, incarnation, std::move(waiter), lock);
}

KVFERRY_INLINE void PeerDirectory::connect(const std::string& local_id, const std::string& peer_id,
                                           const std::string& url, std::uint64_t incarnation, Waiter waiter,
                                           Lock& lock) {
  Peer* const peer = closed_ ? nullptr : find_or_add(peer_id, true);
  if (peer == nullptr) {
    const Failure failure =
        closed_ ? Failure{errc::closed, {}}
                : Failure{errc::resource_limit,
                          "this channel is connected to " + std::to_string(options_.max_peers) + " peers already"};
    lock.unlock();
    waiter.tell(failure);
    return;
  }
  const bool is_that_one = peer->link && peer->instance.incarnation == incarnation;
  if (incarnation != 0 && !(is_that_one && peer->url == url)) {
    ask_who(*peer, local_id, url, incarnation, std::move(waiter), lock);
    return;
  }
  if (peer->link && peer->attempt.moves && peer->attempt.url == url) {
    peer->movers.push_back(arriving_at(local_id, peer_id, url, std::move(waiter)));
    return;
  }
  if (peer->link && peer->url != url) {
    ask_who(*peer, local_id, url, 0, std::move(waiter), lock);
    return;
  }
  const Failure known_otherwise = why_known_otherwise(*peer, local_id);
  if (peer->state == Peer::State::ready || known_otherwise) {
    lock.unlock();
    waiter.tell(known_otherwise);
    return;
  }
  if (waiter.over()) {
    return;  // others may wait for the attempt that goes on
  }
  peer->local_id = local_id;
  peer->url = url;
  if (peer->dialing() && peer->attempt.url != url) {
    end_attempt(peer->attempt);  // nobody wants to get there any more
  }
  wait(*peer, arriving_at(local_id, peer_id, url, std::move(waiter)), lock);
}

/// The peer may be connected first from elsewhere: by itself, or by somebody who says that it is at another url.
KVFERRY_INLINE PeerDirectory::Waiter PeerDirectory::arriving_at(const std::string& local_id, const std::string& peer_id,
                                                                const std::string& url, Waiter waiter) {
  const auto deadline = waiter.deadline;
  auto over = waiter.over;
  auto tell = [weak = weak_from_this(), local_id, peer_id, url, waiter = std::move(waiter)](const Failure& failure) {
    const auto self = weak.lock();
    if (failure || !self) {
      waiter.tell(failure);
    } else {
      try {
        self->arrive(local_id, peer_id, url, waiter);
      } catch (...) {
        waiter.tell(failure_being_handled());
      }
    }
  };
  return {deadline, std::move(tell), std::move(over)};
}

KVFERRY_INLINE void PeerDirectory::arrive(const std::string& local_id, const std::string& peer_id,
                                          const std::string& url, Waiter waiter) {
  Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  if (!closed_ && it != peers_.end() && it->second.link && it->second.url != url) {
    ask_who(it->second, local_id, url, 0, std::move(waiter), lock);
    return;
  }
  const Failure known_otherwise = it == peers_.end() ? Failure() : why_known_otherwise(it->second, local_id);
  lock.unlock();
  waiter.tell(known_otherwise);
}

/// A connection has one id for this channel. Another one can't be told on it, and a second connection would end what is under
/// way on the first. (To a peer that has connected by itself this channel has the id that the peer has given it.)
KVFERRY_INLINE Failure PeerDirectory::why_known_otherwise(const Peer& peer, const std::string& local_id) {
  if (!peer.link || !peer.dialed || peer.local_id == local_id) {
    return {};
  }
  return {std::make_error_code(std::errc::invalid_argument),
          "the peer is connected and knows this channel as " + in_quotes(peer.local_id) + ", not " +
              in_quotes(local_id) + ": disconnect it to connect by another id"};
}

KVFERRY_INLINE void PeerDirectory::acknowledge(const std::string& peer_id) {
  const Lock lock(mutex_);
  if (const auto it = peers_.find(peer_id); it != peers_.end()) {
    it->second.acknowledged_instance = it->second.instances;
  }
}

KVFERRY_INLINE Failure PeerDirectory::acknowledge(const std::string& peer_id, std::uint64_t incarnation,
                                                  PeerInfo& info) {
  std::shared_ptr<Link> link;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || !it->second.link) {
      return {errc::connection_lost, "the connection was lost as soon as it was made"};
    }
    Peer& peer = it->second;
    if (peer.instance.incarnation != incarnation) {
      return another_incarnation(incarnation, peer.instance.incarnation);
    }
    peer.acknowledged_instance = peer.instances;
    link = peer.link;
    info = describe(peer);
  }
  info.path = link->path_with_remark();
  return {};
}

KVFERRY_INLINE void PeerDirectory::close() {
  std::map<std::string, Peer, std::less<>> peers;
  std::vector<Published> links;
  std::map<std::uint64_t, FenceHandler> fences;
  std::map<std::uint64_t, Leave> leaves;
  std::vector<std::shared_ptr<Link>> open;
  // What needs memory here comes before the first change: a call that has none can be made again.
  const std::string why = "the channel was closed";
  {
    Lock lock(mutex_);
    closed_ = true;
    no_visits_.wait(lock, [&] { return visits_ == 0; });
    open.reserve(links_.size());
    for (const auto& published : links_) {
      if (auto link = published.link.lock()) {
        open.push_back(std::move(link));
      }
    }
    peers.swap(peers_);
    links.swap(links_);
    fences.swap(fences_);
    leaves.swap(leaves_);
  }
  // From here on nobody else knows of them: what one of them throws must not keep the others from their end.
  if_memory_lasts([&] { take_leave(open); });
  for (const auto& link : open) {
    if_memory_lasts([&] { link->shut(errc::closed, why); });
  }
  for (const auto& [number, then] : fences) {
    if_memory_lasts([&end = then] { end(errc::closed, nullptr); });
  }
  for (const auto& [number, leave] : leaves) {
    if_memory_lasts([&end = leave.then] { end(errc::closed); });
  }
  for (auto& [id, peer] : peers) {
    for (const auto* const list : {&peer.waiting, &peer.movers}) {
      for (const auto& waiting : *list) {
        if_memory_lasts([&] { waiting.tell({errc::closed, {}}); });
      }
    }
    for (const auto& [number, asking] : peer.asking) {
      if_memory_lasts([&tell = asking.tell] { tell({errc::closed, {}}); });
    }
    for (auto& newcomer : peer.newcomers) {
      if_memory_lasts([&] { newcomer.reply(refusal(errc::closed, "the channel is closed")); });
    }
  }
}

}  // namespace kvferry::kit
