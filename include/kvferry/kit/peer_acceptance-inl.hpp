// SPDX-License-Identifier: Apache-2.0
#pragma once

// Peers' attempts to connect to this side.
#include <algorithm>
#include <memory>
#include <utility>

#include <kvferry/kit/peer_attempts-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Only a dial that lasts until the other side asks again is worth waiting for: else one that is tried again and again, each
/// time too shortly, would keep the other side's from ever getting through.
inline constexpr std::chrono::milliseconds least_rest_of_a_winner = longer_than_the_call + 2 * patience_with_the_other;

}  // namespace internal

KVFERRY_INLINE Failure PeerDirectory::check(const InitQuestion& question, const std::string& key) const {
  if (Failure failure = check_id(question.sender_id, "the handshake's sender")) {
    return failure;
  }
  if (options_.keyring && !options_.keyring->may_be(key, question.sender_id)) {
    return {errc::authentication_failed,
            "peer " + in_quotes(question.sender_id) + ": the keyring doesn't have its key " + key + " for this id"};
  }
  if (Failure failure = check_id(question.receiver_id, "the handshake's receiver")) {
    return failure;
  }
  if (!question.init_url.empty()) {
    std::error_code ec;
    if ((void)parse_url(question.init_url, ec); ec) {
      return {ec, "peer " + in_quotes(question.sender_id) + ": init url " + in_quotes(question.init_url)};
    }
  }
  Failure failure = check_handshake({hooks_.name, incarnation_}, question.sender_id, question.version,
                                    question.transport, question.incarnation, question.regions);
  return failure ? failure
                 : check_region_numbers(question.sender_id, question.regions.size(), question.region_numbers,
                                        question.next_region, question.given_regions);
}

KVFERRY_INLINE void PeerDirectory::answer(const SideMessage& message, HandshakeService::Reply reply) {
  std::error_code ec;
  auto question = decode_side_message<InitQuestion>(message, ec);
  if (const Failure failure =
          ec ? Failure{ec, "malformed " + in_quotes(message.type())} : check(question, reply.key())) {
    refuse(reply, question.sender_id, failure);
    return;
  }
  take(std::move(question), std::move(reply));
}

KVFERRY_INLINE InitAnswer PeerDirectory::describe_self(const RegionList& regions) const {
  InitAnswer answer;
  answer.transport = hooks_.name;
  answer.incarnation = incarnation_;
  describe_regions(regions, answer);
  return answer;
}

KVFERRY_INLINE void PeerDirectory::accept(Peer& peer, const InitQuestion& question, HandshakeService::Reply reply,
                                          Lock& lock) {
  if (is_outdated(peer, question)) {
    lock.unlock();
    reply(refusal(errc::peer_cancelled, "a later attempt of this peer's to connect has come before"));
    return;
  }
  const auto told_regions = regions_->now();
  InitAnswer answer = describe_self(*told_regions);
  const bool known = peer.instance.shown_by(question.incarnation, question.secret);
  const bool this_side_wins = !peer.attempt.gave_yield && incarnation_ < question.incarnation &&
                              peer.attempt.deadline - Clock::now() > least_rest_of_a_winner;
  // A peer that has accepted this side's dial awaits its connection: this is an old question of it, or it has lost patience.
  // A stranger that uses the peer's id may wait as well.
  const bool accepted_there = peer.attempt.instance.incarnation == question.incarnation;
  if (peer.dialing() && !peer.attempt.gives_way() && (this_side_wins || accepted_there)) {
    peer.attempt.gave_yield = true;
    answer.status = InitAnswer::yield;
    lock.unlock();
    reply(encode_side_message(answer));
    return;
  }
  const std::string told_url = url_for_others(question.init_url);
  auto deadline = deadline_after(options_.handshake_timeout);
  if (question.timeout_ms) {
    deadline = std::min(deadline, deadline_after(bounded_milliseconds(*question.timeout_ms)));
  }
  Attempt& attempt = place_for(peer, question, known);
  try {
    begin_attempt(peer, attempt, deadline);
  } catch (...) {
    std::erase_if(peer.candidates,
                  [](const Attempt& candidate) { return candidate.number == 0; });  // no deadline ends it
    throw;
  }
  attempt.accepting = true;
  attempt.known = known;
  attempt.silent_probe = peer.link && !peer.lives() ? peer.last_probe : 0;
  attempt.fenced_until = fenced_until(question.fenced_us);
  answer.fenced_us = time_since_fence(peer, question, known);
  attempt.local_id = question.receiver_id;
  attempt.url = told_url;
  attempt.instance.incarnation = question.incarnation;
  attempt.instance.its_secret = question.secret.value_or(Bytes());
  attempt.instance.its_attempt = question.attempt.value_or(0);
  // The old secret is only shown to a peer that has proved to be the one that was connected.
  attempt.instance.own_secret = known ? peer.instance.own_secret : new_secret();
  if (&attempt == &peer.attempt) {
    dial_beside_later(peer);
  }
  const std::uint64_t number = attempt.number;
  answer.secret = attempt.instance.own_secret;
  const std::string source = reply.source();
  PeerDescription described{question.sender_id, question.incarnation, told_url, {}, {}, source};
  read_regions(question, described);
  const auto host = std::make_shared<Host>(*this, std::move(described), told_regions);
  attempt.host = host;
  std::optional<AttemptSlots::Attempt> displaced;
  if (!peer.description && !peer.named) {
    displaced = slots_.enter({peer.id, number}, source);
    if (slots_.crowded()) {
      answer.crowded = true;
    }
  }
  const Stay stay(*this);
  lock.unlock();
  if (displaced) {
    fail_attempt(displaced->peer_id, displaced->number,
                 {errc::resource_limit, "newer handshakes have taken the place of one that wasn't followed up"});
  }

  try {
    answer.endpoint =
        hooks_.accept(host, question.endpoint, deadline, link_handler(question.sender_id, number, host, nullptr));
  } catch (...) {
    const Failure failure = failure_being_handled();
    std::vector<Waiter> told;
    drop_attempt(question.sender_id, number, failure, {}, told);
    tell(told, failure);
    refuse(reply, question.sender_id, failure);
    return;
  }
  answer.status = InitAnswer::ok;
  answer.timeout_ms = milliseconds_until(deadline);
  reply(encode_side_message(answer));
}

/// Questions travel on connections of their own: that of an attempt that the peer has given up may come after that of its next
/// one, which it must not end.
KVFERRY_INLINE bool PeerDirectory::is_outdated(const Peer& peer, const InitQuestion& question) {
  const auto is_later = [&](const Instance& instance, const std::string& local_id) {
    return local_id == question.receiver_id && instance.its_attempt > question.attempt.value_or(instance.its_attempt) &&
           instance.shown_by(question.incarnation, question.secret);
  };
  return is_later(peer.instance, peer.local_id) || is_later(peer.attempt.instance, peer.attempt.local_id) ||
         std::ranges::any_of(peer.candidates, [&](const Attempt& candidate) {
           return is_later(candidate.instance, candidate.local_id);
         });
}

/// The attempt of the peer itself takes the place of this side's dial where that waits for it, and that of one whom nobody
/// knows yet a place that is free. Else they are beside it, and the dial goes on: it may be an old question of the peer's,
/// whose connection will never come.
KVFERRY_INLINE PeerDirectory::Attempt& PeerDirectory::place_for(Peer& peer, const InitQuestion& question, bool known) {
  const bool first = !peer.description && peer.attempt.number == 0;
  if ((known && (!peer.dialing() || peer.attempt.gives_way()) && !peer.attempt.moves) || first) {
    end_attempt(peer.attempt);
    return peer.attempt;
  }
  std::erase_if(peer.candidates, [&](Attempt& candidate) {
    const bool again = candidate.instance.shown_by(question.incarnation, question.secret);
    if (again) {
      end_attempt(candidate);
    }
    return again;
  });
  make_room_for_candidate(peer);
  return peer.candidates.emplace_back();
}

/// Nobody who only says that he is the peer takes the place of one that has shown it.
KVFERRY_INLINE void PeerDirectory::make_room_for_candidate(Peer& peer) {
  if (peer.candidates.size() < max_candidates) {
    return;
  }
  const auto unknown = std::ranges::find(peer.candidates, false, &Attempt::known);
  const auto oldest = unknown == peer.candidates.end() ? peer.candidates.begin() : unknown;
  end_attempt(*oldest);
  peer.candidates.erase(oldest);
}

}  // namespace kvferry::kit
