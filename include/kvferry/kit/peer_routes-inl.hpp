// SPDX-License-Identifier: Apache-2.0
#pragma once

// The way of operations to a link: at once, or when there is one; and what becomes of them when it breaks.
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/log.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/serving.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void PeerDirectory::route(const std::shared_ptr<Operation>& operation, Serving* serving) {
  route(operation, Routed::anew, serving);
}

KVFERRY_INLINE void PeerDirectory::route(const std::shared_ptr<Operation>& operation, Routed how, Serving* serving) {
  const bool has_waited = how != Routed::anew;
  const TransferRequest& request = operation->request();
  Lock lock(mutex_);
  if (operation->finished()) {
    return;  // stopped on its way here: nobody is to be connected to for it
  }
  const auto it = peers_.find(request.peer_id);
  if (closed_ || it == peers_.end() || !it->second.description) {
    const bool closed = closed_;
    lock.unlock();
    operation->finish(closed ? errc::closed : errc::unknown_peer);
    return;
  }
  Peer& peer = it->second;
  if (!has_waited) {
    operation->count_for(peer.counters);
  }
  const std::uint64_t meant_for = operation->mean_for(peer.acknowledged_instance);
  if (peer.state != Peer::State::ready && !(has_waited && peer.state == Peer::State::handing_over)) {
    if (!peer.link && peer.attempt.number == 0 && peer.candidates.empty() && peer.url.empty()) {
      const Failure failure = peer.last_failure;
      lock.unlock();
      operation->finish(failure.code, failure.sentence + ", and the peer's init url is not known");
      return;
    }
    const auto tell = [weak = weak_from_this(), operation](const Failure& failure) {
      const auto self = weak.lock();
      if (failure || !self) {
        operation->finish(self ? failure.code : errc::closed, failure.sentence);
      } else if (!operation->stop_cause()) {
        try {
          self->route(operation, Routed::has_waited);
        } catch (...) {
          operation->finish(failure_being_handled().code);
        }
      }
    };
    wait(peer, {operation->deadline(), tell, [operation] { return operation->finished(); }}, lock);
    return;
  }
  const auto link = peer.link;
  const auto description = peer.description;
  if (request.incarnation != 0) {
    if (request.incarnation != description->incarnation) {
      lock.unlock();
      operation->finish(errc::peer_restarted, "the operation is meant for the peer's incarnation " +
                                                  std::to_string(request.incarnation) + "; this one is " +
                                                  std::to_string(description->incarnation));
      return;
    }
  } else if (request.one_sided() && meant_for != peer.instances) {
    // Told: whatever is started from now on is meant for the new one.
    peer.acknowledged_instance = peer.instances;
    lock.unlock();
    operation->finish(errc::peer_restarted, "the peer restarted: it is incarnation " +
                                                std::to_string(description->incarnation) +
                                                " now; page indexes agreed before are stale");
    return;
  }
  const bool fenced = request.kind == TransferKind::write && operation->started() <= peer.fenced_until;
  lock.unlock();
  if (fenced) {
    operation->finish(errc::fenced,
                      "the peer fenced its memory off when this had been started, and waited for a connection");
    return;
  }
  Failure failure = check_against_peer(
      request, *description,
      options_.require_equal_page_sizes ? std::span(options_.regions) : std::span<const MemoryRegion>());
  if (failure.code == errc::page_size_mismatch && regions_->now()->find(request.remote_region) == nullptr) {
    failure = check_against_peer(request, *description, {});  // this channel has taken its region back
  }
  if (failure) {
    if (failure.code == errc::unknown_region && how != Routed::has_asked && hooks_.region_changes) {
      ask_for_regions(operation, link);
      return;
    }
    operation->finish(failure.code, std::move(failure.sentence));
    return;
  }
  if (serving != nullptr) {
    serving->begin(link, request);
  }
  operation->start_on(link);
}

KVFERRY_INLINE void PeerDirectory::hand_over(const std::string& peer_id, const Link* link) {
  for (;;) {
    std::vector<Waiter> told;
    Failure failure;
    {
      Lock lock(mutex_);
      const auto it = peers_.find(peer_id);
      if (closed_ || it == peers_.end()) {
        return;
      }
      Peer& peer = it->second;
      if (peer.state == Peer::State::handing_over && peer.link.get() == link) {
        if (peer.waiting.empty()) {
          peer.state = Peer::State::ready;
          return;
        }
      } else if (peer.link || peer.attempt.number != 0 || peer.waiting.empty()) {
        dial_beside_later(peer);
        return;
      } else if (!peer.url.empty()) {
        std::erase_if(peer.waiting, [](const Waiter& waiting) { return waiting.over(); });
        if (!peer.waiting.empty()) {
          start_dial(peer, lock);  // it broke meanwhile; whoever still waits gets another attempt
        }
        return;
      } else {
        failure = peer.last_failure;
      }
      told.swap(peer.waiting);
    }
    tell(told, failure);
  }
}

KVFERRY_INLINE void PeerDirectory::link_failed(const std::string& peer_id, const Link& link,
                                               std::error_code cause) noexcept {
  std::shared_ptr<Link> dropped;
  std::vector<RegionAsker> askers;
  std::string sentence;
  if_memory_lasts([&] { sentence = "the connection to the peer was lost: " + cause.message(); });
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.link.get() != &link) {
      return;
    }
    Peer& peer = it->second;
    // For this no memory is needed: nobody is to be sent to a link that isn't there.
    dropped = std::exchange(peer.link, nullptr);
    peer.state = Peer::State::unconnected;
    peer.out_of_use_since = Clock::now();
    peer.last_failure = {cause, std::move(sentence)};
    askers = take_askers(peer);
    stranger_links_.leave(peer_id);
    if_memory_lasts([&] { end_probe(peer); });
    if_memory_lasts([&] { events_->push({PeerEventKind::gone, peer_id, peer.description->incarnation, cause}); });
  }
  // A peer that has closed its channel has done nothing out of order.
  const auto level = cause == errc::peer_closed ? LogLevel::info : LogLevel::warning;
  logger_->log(level, "peer_lost", peer_id, cause,
               [&] { return "the connection " + dropped->path() + " was lost: " + cause.message(); });
  if_memory_lasts([&] { route_later(std::move(askers), Routed::has_waited); });  // else they end at their deadlines
}

KVFERRY_INLINE void PeerDirectory::break_link(const std::string& peer_id, Link& link, std::error_code cause,
                                              std::string_view why) {
  std::string sentence;
  if_memory_lasts([&] { sentence = why; });
  link_failed(peer_id, link, cause);
  link.shut(cause, sentence);
}

}  // namespace kvferry::kit
