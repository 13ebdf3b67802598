// SPDX-License-Identifier: Apache-2.0
#pragma once

// Taking leave of one peer: its operations and attempts to connect are cancelled, and when its operations have ended, its
// link says goodbye and is shut.
#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// How soon a link that has more to say is asked again.
inline constexpr std::chrono::milliseconds leave_step{1};

}  // namespace internal

KVFERRY_INLINE void PeerDirectory::disconnect(const std::string& peer_id, std::function<void(std::error_code)> then) {
  if (const std::size_t dropped = notifications_->drop_unasked(peer_id); dropped != 0) {
    logger_->log(LogLevel::info, "notifications_dropped", peer_id, errc::cancelled, [&] {
      return std::to_string(dropped) + " notifications with keys that nobody waited for went with the peer";
    });
  }
  std::vector<Waiter> told;
  std::error_code refused;
  std::uint64_t number = 0;
  std::shared_ptr<Link> link;
  std::vector<RegionAsker> askers;
  Failure last_failure{errc::unknown_peer, "this side disconnected the peer"};
  const Failure disconnected{errc::cancelled, "the peer was disconnected"};
  const auto much_later = deadline_after(std::chrono::hours(24 * 365));
  std::shared_ptr<Expiry> go_on;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (closed_) {
      refused = errc::closed;
    } else if (it == peers_.end()) {
      refused = errc::unknown_peer;
    } else {
      Peer& peer = it->second;
      // All that needs memory comes before the first change.
      told.reserve(peer.waiting.size() + peer.movers.size() + peer.asking.size());
      number = ++last_number_;
      go_on = Expiry::make([weak = weak_from_this(), number] {
        if (const Visit self(weak); self) {
          self->go_on_leaving(number);
        }
      });
      const auto leave = leaves_.emplace(number, Leave{peer_id, peer.link, nullptr}).first;
      try {
        deadlines_->add(much_later, go_on);
      } catch (...) {
        leaves_.erase(leave);
        throw;
      }
      leave->second.then = std::move(then);
      link = std::exchange(peer.link, nullptr);
      end_attempts(peer);
      for (auto* const list : {&peer.waiting, &peer.movers}) {
        std::ranges::move(*list, std::back_inserter(told));
        list->clear();
      }
      for (auto& [asked, waiter] : peer.asking) {
        told.push_back(std::move(waiter));
      }
      peer.asking.clear();
      if (link) {
        peer.state = Peer::State::unconnected;
        peer.out_of_use_since = Clock::now();
        if_memory_lasts([&] { end_probe(peer); });
        askers = take_askers(peer);  // they are stopped with the others
        stranger_links_.leave(peer_id);
        if_memory_lasts([&] {
          events_->push({PeerEventKind::gone, peer_id, peer.description->incarnation, errc::cancelled});
        });
      }
      peer.last_failure = std::move(last_failure);
      peer.last_awaited.clear();
    }
  }
  if (refused) {
    then(refused);  // NOLINT(bugprone-use-after-move): moved only where nothing is refused
    return;
  }
  if (link) {
    logger_->log(LogLevel::info, "peer_lost", peer_id, errc::cancelled,
                 [&] { return "the connection " + link->path() + " was ended by this side"; });
  }
  tell(told, disconnected);
  try {
    const std::uint64_t last_stopped = operations_->stop(peer_id, errc::cancelled);
    end_dial_for_nobody(peer_id, Clock::duration::zero());
    // Called with locks held, and by the link's own thread: what shuts the link runs elsewhere.
    operations_->when_operations_ended(
        peer_id, last_stopped, [deadlines = deadlines_, much_later, go_on] { deadlines->hasten(much_later, *go_on); });
  } catch (const std::exception&) {
    deadlines_->hasten(much_later, *go_on);  // memory is used up: what has not ended does so with the link
  }
}

KVFERRY_INLINE void PeerDirectory::stopped_waiting(std::string_view peer_id) noexcept {
  // One whose call has timed out has a little more time than the call.
  if_memory_lasts([&] { end_dial_for_nobody(peer_id, longer_than_the_call); });
}

/// For each of many that are stopped one after the other: so only the last ones are looked at, and dropped.
KVFERRY_INLINE void PeerDirectory::end_dial_for_nobody(std::string_view peer_id, Clock::duration least_rest) {
  std::vector<Waiter> over;  // destroyed after the lock is released
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  if (closed_ || it == peers_.end() || !it->second.dialing() ||
      it->second.attempt.deadline - Clock::now() <= least_rest) {
    return;
  }
  Peer& peer = it->second;
  for (auto* const list : {&peer.waiting, &peer.movers}) {
    while (!list->empty() && list->back().over()) {
      over.push_back(std::move(list->back()));
      list->pop_back();
    }
    if (!list->empty()) {
      return;
    }
  }
  end_attempt(peer.attempt);
  peer.out_of_use_since = Clock::now();
}

/// Begins anew where it has thrown.
KVFERRY_INLINE void PeerDirectory::go_on_leaving(std::uint64_t number) {
  Leave leave;
  bool is_first = true;
  {
    const Lock lock(mutex_);
    const auto it = leaves_.find(number);
    if (it == leaves_.end()) {
      return;
    }
    leave = it->second;
    is_first =
        std::none_of(leaves_.begin(), it, [&](const auto& earlier) { return earlier.second.peer_id == leave.peer_id; });
  }
  // An earlier one's link has a goodbye to say still, and nothing of it may land when this one has ended.
  if (!is_first || (leave.link && leave.link->take_leave())) {
    deadlines_->add(Clock::now() + leave_step, Expiry::make([weak = weak_from_this(), number] {
                      if (const Visit self(weak); self) {
                        self->go_on_leaving(number);
                      }
                    }));
    return;
  }
  if (leave.link) {
    leave.link->shut(errc::cancelled, "this side disconnected the peer");
  }
  std::vector<std::shared_ptr<Link>> later;  // these say goodbye themselves
  {
    const Lock lock(mutex_);
    for (const auto& [other, leaving] : leaves_) {
      later.push_back(other == number ? nullptr : leaving.link);
    }
  }
  (void)shut_old_links(leave.peer_id, later);
  {
    const Lock lock(mutex_);
    leaves_.erase(number);
  }
  leave.then({});
}

}  // namespace kvferry::kit
