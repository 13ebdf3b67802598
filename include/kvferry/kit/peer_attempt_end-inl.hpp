// SPDX-License-Identifier: Apache-2.0
#pragma once

// The end of an attempt: a link, or the reason why there is none.
#include <algorithm>
#include <memory>
#include <utility>

#include <kvferry/kit/peer_attempts-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void PeerDirectory::fail_attempt(const std::string& peer_id, std::uint64_t number,
                                                const Failure& failure) {
  std::vector<Waiter> told;
  std::string last_awaited;
  const bool was_late = failure.code == errc::timed_out;
  if (was_late) {
    if_memory_lasts([&] { last_awaited = awaited(peer_id, number); });
  }
  const auto accepting = drop_attempt(peer_id, number, failure, std::move(last_awaited), told);
  if (!accepting) {
    return;
  }
  if (was_late) {
    // A call whose own time is over, too, has a timer of its own, and says itself that it had too little time.
    std::erase_if(told, [now = Clock::now()](const Waiter& waiting) { return waiting.deadline <= now; });
  }
  // Before anybody hears of it, who may then ask for the statistics.
  (*accepting ? refused_ : failed_dials_).count(failure.code);
  // Callers that wait for a connection hear of it; of a peer's attempt nobody here does.
  logger_->log(*accepting ? LogLevel::warning : LogLevel::info, *accepting ? "accept_failed" : "connect_failed",
               peer_id, failure.code, [&] { return failure.sentence; });
  tell(told, failure);
}

KVFERRY_INLINE void PeerDirectory::tell(const std::vector<Waiter>& told, const Failure& failure) noexcept {
  for (const auto& waiting : told) {
    if_memory_lasts([&] { waiting.tell(failure); });  // the others hear of it all the same
  }
}

/// @param awaited for what the attempt waited, if it ends because it is late.
/// @param told those who are to hear of it.
/// @return whether it was a peer's attempt; nothing if it is over already.
KVFERRY_INLINE std::optional<bool> PeerDirectory::drop_attempt(const std::string& peer_id, std::uint64_t number,
                                                               const Failure& failure, std::string awaited,
                                                               std::vector<Waiter>& told) {
  // Where a peer gives so little time, trying again at once would be all that this side does.
  constexpr std::chrono::milliseconds least_patience{50};
  bool was_acceptance = false;
  {
    Lock lock(mutex_);
    Peer* const peer = current(peer_id, number);
    if (peer == nullptr) {
      return std::nullopt;
    }
    const auto now = Clock::now();
    Attempt& attempt = *peer->find(number);
    was_acceptance = attempt.accepting;
    const bool had_its_time =
        now >= attempt.deadline && attempt.peers_patience.value_or(least_patience) >= least_patience;
    const auto deadline = attempt.deadline;
    const bool was_move = attempt.moves;
    const bool given_up = attempt.given_up;
    if (was_move) {
      told.swap(peer->movers);  // whoever said that the peer has moved hears that it can't be reached there
    }
    end_attempt(attempt);
    std::erase_if(peer->candidates, [](const Attempt& candidate) { return candidate.number == 0; });
    // The peer's own dial may still be under way. Of a peer that nobody knows yet it may be any.
    const bool may_come = std::ranges::any_of(
        peer->candidates, [&](const Attempt& candidate) { return candidate.known || !peer->description; });
    if (!peer->link && peer->attempt.number == 0 && !may_come) {
      peer->out_of_use_since = now;
      peer->last_failure = failure;
      // A refusal by the peer may have this code, too.
      peer->last_awaited = now >= deadline ? std::move(awaited) : std::string();
      peer->last_awaited_until = now + last_awaited_lasts;
      // A call that came later may have more time than the attempt had, and one that waited for the peer's own attempt
      // has had no attempt yet.
      const bool again = !peer->url.empty() && (was_acceptance || was_move || had_its_time || given_up);
      const auto rest = std::stable_partition(peer->waiting.begin(), peer->waiting.end(),
                                              [&](const Waiter& waiting) { return !again || waiting.deadline <= now; });
      std::move(peer->waiting.begin(), rest, std::back_inserter(told));
      peer->waiting.erase(peer->waiting.begin(), rest);
      std::erase_if(peer->waiting, [](const Waiter& waiting) { return waiting.over(); });
      if (!peer->waiting.empty()) {
        start_dial(*peer, lock);
      } else if (!peer->description && !peer->named && !peer->in_use()) {
        fenced_forgotten_at_ = std::max(fenced_forgotten_at_, peer->fenced_at);
        peers_.erase(peer_id);
      }
    }
  }
  return was_acceptance;
}

KVFERRY_INLINE void PeerDirectory::publish(const std::string& peer_id, std::uint64_t number,
                                           const std::shared_ptr<Host>& host, std::shared_ptr<Link> link) {
  const Link* const published = link.get();
  const std::string seen_at = link->remote_address();
  std::vector<std::shared_ptr<Link>> replaced;
  std::vector<std::shared_ptr<Link>> others;
  Failure why{errc::connection_lost, "the connection was replaced by a new one"};
  std::uint64_t before = 0;
  bool reconnected = false;
  bool accepting = false;
  Displaced displaced;
  std::shared_ptr<Link> made;
  std::vector<RegionAsker> askers;
  Failure failed;
  std::string other_name;
  {
    const Lock lock(mutex_);
    Peer* const peer = current(peer_id, number);
    Attempt* const attempt = peer == nullptr ? nullptr : peer->find(number);
    // All that needs memory comes before the first change.
    std::string url;
    Failure restarted;
    Published entry{peer_id, link};
    replaced.reserve(1);
    if (attempt != nullptr) {
      url = with_zone_of(attempt->url.empty() ? peer->url : attempt->url, seen_at);
      if (peer->description && !attempt->known) {
        restarted = {errc::peer_restarted, "the peer is another one: incarnation " +
                                               std::to_string(peer->instance.incarnation) + " is now " +
                                               std::to_string(host->peer().incarnation)};
      }
      const auto same = std::ranges::find_if(peers_, [&](const auto& known) {
        return &known.second != peer && known.second.description &&
               known.second.instance.incarnation == attempt->instance.incarnation;
      });
      if (same != peers_.end()) {
        other_name = same->first;
      }
      // Also one that has failed, and is being shut by whoever noticed: not before nothing is received on it any more is
      // the peer to start anything on the new one.
      others = links_but(link, peer_id);
      std::erase_if(links_, [](const Published& old) { return old.link.expired(); });
      links_.reserve(links_.size() + 1);
      peer->waiting.reserve(peer->waiting.size() + peer->movers.size());
    }
    if (attempt == nullptr) {
      replaced.push_back(std::move(link));
    } else if (host->failed()) {
      replaced.push_back(std::move(link));
      failed = {errc::connection_lost, "the connection broke as soon as it was made"};
    } else if (attempt->accepting && !attempt->known && !peer->gives_way_to(*attempt)) {
      replaced.push_back(std::move(link));
      why = {errc::identity_conflict, "another channel is connected as this peer, and lives"};
      failed = why;
    } else if (attempt->accepting && !peer->named && !enter_stranger(*peer, host->peer().source, *link, displaced)) {
      replaced.push_back(std::move(link));
      why = {errc::resource_limit, too_many_links};
      failed = why;
    } else {
      reconnected = peer->description != nullptr;
      accepting = attempt->accepting;
      if (!accepting) {
        stranger_links_.leave(peer_id);
      }
      made = link;
      ++peer->counters->connects;
      if (restarted) {
        before = peer->instance.incarnation;
        why = std::move(restarted);
      }
      if (!attempt->known) {
        ++peer->instances;
      }
      if (!peer->description) {
        peer->acknowledged_instance = peer->instances;
      }
      if (const auto used = std::exchange(attempt->host, nullptr)) {
        used->keep();
      }
      if (!attempt->known || attempt->local_id != peer->local_id) {
        peer->fence_answered.reset();
      }
      peer->fenced_until = std::max(peer->fenced_until, attempt->fenced_until);
      peer->instance = std::move(attempt->instance);
      peer->local_id = std::move(attempt->local_id);
      peer->dialed = !accepting;
      if (!attempt->url.empty() && !accepting) {  // where the peer only says that it answers, nobody has answered yet
        if_memory_lasts([&] { remember_kvferry(attempt->url); });
      }
      peer->url = std::move(url);
      // A caller that says that the peer has moved has the last word.
      Attempt move = peer->attempt.moves && attempt != &peer->attempt ? std::exchange(peer->attempt, {}) : Attempt();
      end_attempts(*peer);
      peer->attempt = std::move(move);
      if_memory_lasts([&] { end_probe(*peer); });
      links_.push_back(std::move(entry));
      replaced = std::move(others);
      askers = take_askers(*peer);
      peer->last_awaited.clear();
      peer->link = std::move(link);
      peer->host = host.get();
      peer->description = host->description();
      peer->state = Peer::State::handing_over;
      if_memory_lasts([&] {
        events_->push({before != 0 ? PeerEventKind::restarted : PeerEventKind::connected, peer_id,
                       peer->description->incarnation,
                       before != 0 ? make_error_code(errc::peer_restarted) : std::error_code()});
      });
      if (!peer->attempt.moves) {
        std::move(peer->movers.begin(), peer->movers.end(), std::back_inserter(peer->waiting));
        peer->movers.clear();
      }
    }
  }
  if (made) {
    made->be_taken();
    ++(accepting ? accepted_ : dialed_);
    reconnected_ += reconnected ? 1 : 0;
    logger_->log(LogLevel::info, "peer_connected", peer_id, {}, [&] {
      return std::string(reconnected ? "again, " : "") + made->path_with_remark() + ", incarnation " +
             std::to_string(host->peer().incarnation);
    });
  }
  if (!other_name.empty()) {
    logger_->log(LogLevel::warning, "identity_conflict", peer_id, errc::identity_conflict, [&] {
      return "it is known here as " + in_quotes(other_name) +
             " already; only one of the two ids has a connection at a time: give each channel one";
    });
  }
  if (before != 0) {
    ++peer_replacements_;
    logger_->log(LogLevel::warning, "peer_replaced", peer_id, why.code, [&] { return why.sentence; });
  }
  if (failed.code == errc::identity_conflict) {
    ++identity_conflicts_;
    logger_->log(LogLevel::warning, "identity_conflict", peer_id, failed.code, [&] { return failed.sentence; });
  }
  for (const auto& old : replaced) {
    old->shut(why.code, why.sentence);
  }
  break_links(displaced);
  if (failed) {
    if_memory_lasts([&] { fail_attempt(peer_id, number, failed); });  // else its time ends it
  }
  hand_over(peer_id, published);
  if_memory_lasts([&] { route_later(std::move(askers), Routed::has_waited); });  // else they end at their deadlines
}

}  // namespace kvferry::kit
