// SPDX-License-Identifier: Apache-2.0
#pragma once

// Fences: nothing of what a peer had started before is to come in, over whatever connection.
//
// The peer answers for the operations that it has started on the link in use, or is about to. Operations that wait on its side
// for a new connection learn from the handshake how long ago the fence was, and end there. A connection that is already being
// made, with a handshake from before the fence, is waited for.
#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// How long a fence waits for connections that are being made, before it gives them up; from when their transport is at the
/// last of its ways (`LinkHost::may_take_until`).
inline constexpr std::chrono::seconds attempt_patience{1};
/// Two hosts' clocks drift apart by less than this part of the time that they measure.
inline constexpr int clock_drift = 1000;

}  // namespace internal

KVFERRY_INLINE std::optional<std::uint64_t> PeerDirectory::time_since_fence(const Peer& peer) {
  if (peer.fenced_at == Clock::time_point::min()) {
    return std::nullopt;
  }
  return static_cast<std::uint64_t>(
      std::chrono::floor<std::chrono::microseconds>(Clock::now() - peer.fenced_at).count());
}

KVFERRY_INLINE std::optional<std::uint64_t> PeerDirectory::time_since_fence(const Peer& peer,
                                                                            const InitQuestion& question, bool known) {
  // Its answer was for writes to the name by which it knew this side then.
  const bool has_answered =
      known && question.receiver_id == peer.local_id && peer.fence_answered && *peer.fence_answered;
  return has_answered ? std::nullopt : time_since_fence(peer);
}

KVFERRY_INLINE Clock::time_point PeerDirectory::fenced_until(std::optional<std::uint64_t> time_since) {
  if (!time_since) {
    return Clock::time_point::min();
  }
  constexpr std::chrono::microseconds longest = std::chrono::hours(24 * 365);
  const std::chrono::microseconds since(std::min(*time_since, static_cast<std::uint64_t>(longest.count())));
  return Clock::now() - since + since / clock_drift;
}

KVFERRY_INLINE void PeerDirectory::fence(const std::string& peer_id, Clock::time_point deadline, FenceHandler then,
                                         std::shared_ptr<const std::atomic<bool>> answered) {
  std::error_code refused;
  {
    const Lock lock(mutex_);
    const auto now = Clock::now();
    const auto it = peers_.find(peer_id);
    if (closed_) {
      refused = errc::closed;
    } else if (it == peers_.end()) {
      fenced_forgotten_at_ = now;
    } else {
      Peer& peer = it->second;
      peer.fenced_at = now;
      peer.fence_answered = std::move(answered);
      // Attempts, perhaps of strangers, mustn't use up the time in which a link that works would have answered.
      if (wait_for_attempts(peer, peer.link ? now + (deadline - now) / 2 : deadline, then)) {
        return;
      }
    }
  }
  then(refused, refused ? nullptr : shut_old_links(peer_id));
}

/// @return false if there are none to be waited for.
KVFERRY_INLINE bool PeerDirectory::wait_for_attempts(Peer& peer, Clock::time_point deadline, FenceHandler& then) {
  const auto is_waited_for = [](const Attempt& attempt) {
    // A dial that has not been answered is asked anew, once, when it is.
    const bool told = attempt.accepting || attempt.instance.incarnation != 0 || attempt.told_again;
    return attempt.number != 0 && told && !attempt.let_go;
  };
  if (!is_waited_for(peer.attempt) && std::ranges::none_of(peer.candidates, is_waited_for)) {
    return false;
  }
  const std::uint64_t number = ++last_number_;
  const auto much_later = deadline_after(std::chrono::hours(24 * 365));
  const auto go_on = Expiry::make([weak = weak_from_this(), id = peer.id, number] {
    if (const Visit self(weak); self) {
      self->go_on_fencing(id, number);
    }
  });
  deadlines_->add(much_later, go_on);
  // The thread that releases it last may be out of memory. Until the last step here there is no fence that it could end.
  const std::shared_ptr<void> hold(
      this, [deadlines = deadlines_, much_later, go_on](void*) { deadlines->hasten(much_later, *go_on); });
  deadlines_->add(std::min(deadline, Clock::now() + attempt_patience), give_up_later(peer.id, number, deadline));
  const auto wait = [&](Attempt& attempt) {
    if (is_waited_for(attempt)) {
      attempt.fences.push_back(hold);
    }
  };
  wait(peer.attempt);
  std::ranges::for_each(peer.candidates, wait);
  fences_[number] = std::move(then);
  return true;
}

KVFERRY_INLINE void PeerDirectory::go_on_fencing(const std::string& peer_id, std::uint64_t number) {
  {
    const Lock lock(mutex_);
    if (!fences_.contains(number)) {
      return;
    }
  }
  const auto link = shut_old_links(peer_id);  // if it throws, this begins anew
  FenceHandler then;
  {
    const Lock lock(mutex_);
    if (auto waiting = fences_.extract(number)) {
      then = std::move(waiting.mapped());
    }
  }
  if (then) {
    then({}, link);
  }
}

KVFERRY_INLINE std::shared_ptr<Expirable> PeerDirectory::give_up_later(const std::string& peer_id, std::uint64_t number,
                                                                       Clock::time_point deadline) {
  return Expiry::make([weak = weak_from_this(), peer_id, number, deadline] {
    if (const Visit self(weak); self) {
      self->give_up_attempts(peer_id, number, deadline);
    }
  });
}

/// @param deadline of the fence.
KVFERRY_INLINE void PeerDirectory::give_up_attempts(const std::string& peer_id, std::uint64_t number,
                                                    Clock::time_point deadline) {
  std::vector<std::uint64_t> attempts;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || !fences_.contains(number)) {
      return;
    }
    const auto now = Clock::now();
    std::optional<Clock::time_point> next;
    const auto add = [&](Attempt& attempt) {
      if (attempt.fences.empty()) {
        return;
      }
      const auto until = attempt.host
                             ? std::min(deadline - attempt_patience, attempt.host->may_take_until()) + attempt_patience
                             : Clock::time_point();
      if (now < until) {
        next = std::min(next.value_or(until), until);
      } else {
        attempt.given_up = true;
        attempts.push_back(attempt.number);
      }
    };
    add(it->second.attempt);
    std::ranges::for_each(it->second.candidates, add);
    if (next) {
      deadlines_->add(*next, give_up_later(peer_id, number, deadline));
    }
  }
  for (const std::uint64_t attempt : attempts) {
    fail_attempt(peer_id, attempt, {errc::connection_lost, "a fence did not wait any longer for the connection"});
  }
}

KVFERRY_INLINE std::shared_ptr<Link> PeerDirectory::shut_old_links(const std::string& peer_id,
                                                                   const std::vector<std::shared_ptr<Link>>& spared) {
  std::vector<std::shared_ptr<Link>> old;
  std::shared_ptr<Link> current;
  {
    const Lock lock(mutex_);
    if (const auto it = peers_.find(peer_id); it != peers_.end()) {
      current = it->second.link;
    }
    old = links_but(current, peer_id);
  }
  std::erase_if(old, [&](const auto& link) { return std::ranges::find(spared, link) != spared.end(); });
  for (const auto& link : old) {
    link->shut(errc::connection_lost, "the connection to the peer was lost");
  }
  return current;
}

KVFERRY_INLINE std::vector<std::shared_ptr<Link>> PeerDirectory::links_but(const std::shared_ptr<Link>& kept,
                                                                           const std::string& peer_id) const {
  std::vector<std::shared_ptr<Link>> links;
  for (const Published& published : links_) {
    if (auto link = published.link.lock(); link && link != kept && published.peer_id == peer_id) {
      links.push_back(std::move(link));
    }
  }
  return links;
}

}  // namespace kvferry::kit
