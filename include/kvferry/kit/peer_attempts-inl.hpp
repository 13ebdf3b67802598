// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/text.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// How long a side that yielded to the other's dial, or accepted it, waits for it before it asks itself: the other may not
/// get through.
inline constexpr std::chrono::milliseconds patience_with_the_other{250};
/// Dials of those who may be a peer, or were to be it.
inline constexpr std::size_t max_candidates = 8;

KVFERRY_INLINE std::uint64_t milliseconds_until(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
  return static_cast<std::uint64_t>(std::max(left, std::chrono::milliseconds::zero()).count());
}

/// As a peer has told them.
KVFERRY_INLINE std::chrono::milliseconds bounded_milliseconds(std::uint64_t count) {
  constexpr std::chrono::milliseconds longest = std::chrono::hours(24 * 365);
  return count > static_cast<std::uint64_t>(longest.count()) ? longest : std::chrono::milliseconds(count);
}

}  // namespace internal

KVFERRY_INLINE void PeerDirectory::refuse(HandshakeService::Reply& reply, const std::string& peer_id,
                                          const Failure& cause) {
  refused_.count(cause.code);
  const bool conflict = cause.code == errc::identity_conflict;
  // Who comes while the channel is being closed has done nothing out of order.
  const auto level = cause.code == errc::closed ? LogLevel::info : LogLevel::warning;
  logger_->log(level, conflict ? "identity_conflict" : "handshake_refused", peer_id, cause.code,
               [&] { return cause.sentence; });
  reply(encode_side_message(SideMessageError{static_cast<int>(code_for_peer(cause.code)), cause.sentence}));
}

KVFERRY_INLINE void PeerDirectory::begin_attempt(const Peer& peer, Attempt& attempt, Clock::time_point deadline) {
  attempt.number = ++last_number_;
  attempt.expiry = std::make_shared<Expiry>([weak = weak_from_this(), id = peer.id, number = attempt.number] {
    if (const Visit self(weak); self) {
      self->fail_attempt(id, number, {errc::timed_out, "the connection was not usable in time"});
    }
  });
  attempt.deadline = deadline;
  deadlines_->add(deadline, attempt.expiry);
}

KVFERRY_INLINE void PeerDirectory::set_deadline(Attempt& attempt, Clock::time_point deadline) {
  deadlines_->remove(attempt.deadline, *attempt.expiry);
  attempt.deadline = deadline;
  deadlines_->add(deadline, attempt.expiry);
}

/// Whatever of it is still under way is dropped: no attempt has its number any more.
KVFERRY_INLINE void PeerDirectory::end_attempt(Attempt& attempt) {
  if (attempt.expiry) {
    deadlines_->remove(attempt.deadline, *attempt.expiry);
  }
  if (!attempt.slot.empty()) {
    slots_.leave(attempt.slot);
  }
  if (attempt.host) {
    attempt.host->abandon();
  }
  attempt = {};
}

KVFERRY_INLINE void PeerDirectory::end_attempts(Peer& peer) {
  end_attempt(peer.attempt);
  for (auto& candidate : peer.candidates) {
    end_attempt(candidate);
  }
  peer.candidates.clear();
}

KVFERRY_INLINE PeerDirectory::Peer* PeerDirectory::current(const std::string& peer_id, std::uint64_t attempt) {
  const auto it = peers_.find(peer_id);
  return closed_ || it == peers_.end() || it->second.find(attempt) == nullptr ? nullptr : &it->second;
}

KVFERRY_INLINE bool PeerDirectory::is_current(const std::string& peer_id, std::uint64_t attempt) {
  const Lock lock(mutex_);
  return current(peer_id, attempt) != nullptr;
}

KVFERRY_INLINE InitQuestion PeerDirectory::question_to(const Peer& peer, const std::string& local_id,
                                                       const std::string& url, const RegionList& regions) const {
  InitQuestion question;
  question.transport = hooks_.name;
  question.sender_id = local_id;
  question.receiver_id = peer.id;
  question.incarnation = incarnation_;
  question.init_url = own_init_url_;
  describe_regions(regions, question);
  question.secret = own_secret(peer, url);
  question.fenced_us = time_since_fence(peer);
  return question;
}

KVFERRY_INLINE Bytes PeerDirectory::own_secret(const Peer& peer, const std::string& url) const {
  if (!peer.instance.own_secret.empty()) {
    return peer.instance.own_secret;
  }
  // One server may be known here by two names. It knows this channel by the secret of the first.
  const auto same = std::ranges::find_if(
      peers_, [&](const auto& entry) { return entry.second.url == url && !entry.second.instance.own_secret.empty(); });
  return same == peers_.end() ? peer.secret : same->second.instance.own_secret;
}

KVFERRY_INLINE void PeerDirectory::start_dial(Peer& peer, Lock& lock) {
  start_dial(peer, peer.local_id, peer.url, lock);
}

KVFERRY_INLINE void PeerDirectory::start_dial(Peer& peer, const std::string& local_id, const std::string& url,
                                              Lock& lock, bool once_more) {
  Clock::time_point deadline = Clock::now();
  for (const auto* const list : {&peer.waiting, &peer.movers}) {
    for (const auto& waiting : *list) {
      deadline = std::max(deadline, waiting.deadline);
    }
  }
  deadline += longer_than_the_call;
  end_attempt(peer.attempt);
  Attempt& made = peer.attempt;
  begin_attempt(peer, made, deadline);
  made.local_id = local_id;
  made.url = url;
  made.moves = peer.link != nullptr;
  made.told_again = once_more;
  const std::uint64_t attempt = made.number;
  const std::string peer_id = peer.id;
  made.told_regions = regions_->now();
  InitQuestion question = question_to(peer, local_id, url, *made.told_regions);
  made.instance.own_secret = *question.secret;
  made.told_at = Clock::now();
  // The peer may be gone when it is asked.
  const std::string question_url = url;  // NOLINT(performance-unnecessary-copy-initialization)
  const Stay stay(*this);
  lock.unlock();

  std::shared_ptr<Dial> dial;
  try {
    dial = hooks_.dial(peer_id);
    question.endpoint = dial->local_endpoint();
  } catch (...) {
    fail_attempt(peer_id, attempt, failure_being_handled());
    return;
  }
  question.timeout_ms = milliseconds_until(deadline);
  const SideMessage message = encode_side_message(question);
  {
    const Lock relock(mutex_);  // let go before the stay ends, whatever is thrown
    Peer* const still = current(peer_id, attempt);
    if (still == nullptr) {
      return;
    }
    still->attempt.dial = dial;
    still->attempt.question = message;
  }
  ask(peer_id, attempt, question_url, message, deadline);
}

KVFERRY_INLINE void PeerDirectory::ask(const std::string& peer_id, std::uint64_t attempt, const std::string& url,
                                       const SideMessage& question, Clock::time_point deadline) {
  const auto wanted = [weak = weak_from_this(), peer_id, attempt] {
    const Visit self(weak);
    return self && self->is_current(peer_id, attempt);
  };
  ask_there(peer_id, url, question, deadline, wanted,
            [weak = weak_from_this(), peer_id, attempt](std::error_code ec, const SideMessage& answer,
                                                        std::string diagnostic, const std::string& reached) {
              if (const Visit self(weak); self) {
                self->dial_answered(peer_id, attempt, {ec, std::move(diagnostic)}, answer, reached);
              }
            });
}

KVFERRY_INLINE void PeerDirectory::ask_again(const std::string& peer_id, std::uint64_t attempt) {
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr || !peer->attempt.yielded) {
    return;
  }
  peer->attempt.yielded = false;
  const std::string url = peer->attempt.url;
  const SideMessage question = peer->attempt.question;
  const auto deadline = peer->attempt.deadline;
  lock.unlock();
  ask(peer_id, attempt, url, question, deadline);
}

/// The peer, or who says that he is, may never make the connection that he has asked for: his question may be of a dial that
/// he has given up.
KVFERRY_INLINE void PeerDirectory::dial_beside_later(Peer& peer) {
  if (!peer.link && peer.attempt.accepting && !peer.attempt.awaited && !peer.waiting.empty() && !peer.url.empty()) {
    peer.attempt.awaited = true;
    call_later(&PeerDirectory::dial_beside, peer.id, peer.attempt.number);
  }
}

/// Somebody waits for the peer, and has waited for the connection of who said that he is the peer: that goes on beside.
KVFERRY_INLINE void PeerDirectory::dial_beside(const std::string& peer_id, std::uint64_t attempt) {
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr || peer->attempt.number != attempt) {
    return;
  }
  peer->attempt.awaited = false;
  std::erase_if(peer->waiting, [](const Waiter& waiting) { return waiting.over(); });
  if (peer->waiting.empty() || peer->url.empty()) {
    return;
  }
  if (!peer->attempt.slot.empty()) {
    slots_.leave(std::exchange(peer->attempt.slot, {}));
  }
  make_room_for_candidate(*peer);
  peer->candidates.push_back(std::exchange(peer->attempt, {}));
  start_dial(*peer, lock);
}

KVFERRY_INLINE void PeerDirectory::call_later(void (PeerDirectory::*what)(const std::string&, std::uint64_t),
                                              const std::string& peer_id, std::uint64_t attempt) {
  deadlines_->add(Clock::now() + patience_with_the_other,
                  std::make_shared<Expiry>([weak = weak_from_this(), what, peer_id, attempt] {
                    if (const Visit self(weak); self) {
                      (*self.operator->().*what)(peer_id, attempt);
                    }
                  }));
}

KVFERRY_INLINE void PeerDirectory::dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure,
                                                 const SideMessage& message, const std::string& reached_address) {
  const InitAnswer answer = read_answer(peer_id, message, failure);
  if (!failure && answer.status != InitAnswer::ok && answer.status != InitAnswer::yield) {
    failure = {errc::handshake_failed, "answered the handshake with status " + in_quotes(answer.status)};
  }
  if (failure) {
    if (failure.code == errc::identity_conflict) {
      if (ask_as_known(peer_id, attempt, reached_address) || !is_current(peer_id, attempt)) {
        return;  // or the other's attempt got through first, and this one met it
      }
      ++identity_conflicts_;
      logger_->log(LogLevel::warning, "identity_conflict", peer_id, failure.code, [&] { return failure.sentence; });
    }
    fail_attempt(peer_id, attempt, failure);
    return;
  }
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr) {
    return;
  }
  Attempt& answered = peer->attempt;
  // Each has accepted the other's dial: one of the two is enough. Once, as it may be a stranger that said he was the peer.
  const bool crosses = answer.status == InitAnswer::ok && !answered.crossed && answer.incarnation < incarnation_ &&
                       std::ranges::any_of(peer->candidates, [&](const Attempt& candidate) {
                         return candidate.instance.incarnation == answer.incarnation;
                       });
  if (answer.status == InitAnswer::yield || crosses) {
    answered.crossed = answered.crossed || crosses;
    answered.yielded = true;
    call_later(&PeerDirectory::ask_again, peer_id, attempt);
    return;
  }
  if (peer->fenced_at >= answered.told_at && !answered.told_again) {
    // The peer is to know of the fence, too.
    const std::string local_id = answered.local_id;
    const std::string url = answered.url;
    start_dial(*peer, local_id, url, lock, true);
    return;
  }
  answered.instance.incarnation = answer.incarnation;
  answered.fenced_until = fenced_until(answer.fenced_us);
  answered.instance.its_secret = answer.secret.value_or(Bytes());
  answered.known = peer->instance.shown_by(answer.incarnation, answer.secret);
  if (answer.timeout_ms) {
    const auto patience = bounded_milliseconds(*answer.timeout_ms);
    // A little less is only the time that the question took: then the call that waits here ends first.
    if (const auto until = deadline_after(patience); until < answered.deadline - longer_than_the_call / 2) {
      answered.peers_patience = patience;
      set_deadline(answered, until);
    }
  }
  PeerDescription described{peer_id, answer.incarnation, answered.url, reached_address, {}};
  read_regions(answer, described);
  auto host = std::make_shared<Host>(*this, std::move(described), answered.told_regions);
  answered.host = host;
  const auto dial = answered.dial;
  const auto deadline = answered.deadline;
  lock.unlock();
  // The peer may write as soon as it has accepted this side, into memory that nothing of an old link's, which perhaps is
  // late, may reach any more then.
  (void)shut_old_links(peer_id);
  try {
    dial->connect(host, answer.endpoint, deadline, link_handler(peer_id, attempt, host, dial));
  } catch (...) {
    fail_attempt(peer_id, attempt, failure_being_handled());
  }
}

KVFERRY_INLINE InitAnswer PeerDirectory::read_answer(const std::string& peer_id, const SideMessage& message,
                                                     Failure& failure) const {
  InitAnswer answer;
  if (!failure) {
    answer = decode_side_message<InitAnswer>(message, failure.code);
    if (failure) {
      failure = {errc::handshake_failed,
                 "answered the handshake with " + in_quotes(message.type()) + ": " + failure.code.message()};
    }
  }
  if (!failure) {
    failure = check_handshake({hooks_.name, incarnation_}, peer_id, answer.version, answer.transport,
                              answer.incarnation, answer.regions);
  }
  if (!failure) {
    failure = check_region_numbers(peer_id, answer.regions.size(), answer.region_numbers, answer.next_region,
                                   answer.given_regions);
  }
  return answer;
}

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
  const auto told_regions = regions_->now();
  InitAnswer answer = describe_self(*told_regions);
  const bool known = peer.instance.shown_by(question.incarnation, question.secret);
  const bool this_side_wins = !peer.attempt.gave_yield && incarnation_ < question.incarnation;
  // Who has accepted this side's dial awaits its connection: this is an old question of his, or he has lost patience.
  // Whoever else says that he is he isn't, or may wait as well.
  const bool accepted_there = peer.attempt.instance.incarnation == question.incarnation;
  if (peer.dialing() && !peer.attempt.yielded && (this_side_wins || accepted_there)) {
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
  begin_attempt(peer, attempt, deadline);
  attempt.accepting = true;
  attempt.known = known;
  attempt.fenced_until = fenced_until(question.fenced_us);
  answer.fenced_us = time_since_fence(peer);
  attempt.local_id = question.receiver_id;
  attempt.url = told_url;
  attempt.instance.incarnation = question.incarnation;
  attempt.instance.its_secret = question.secret.value_or(Bytes());
  // Who doesn't prove that he is the peer that was connected isn't told what that one is shown.
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
  std::optional<std::string> displaced;
  std::uint64_t displaced_number = 0;
  if (!peer.description && !peer.named && &attempt == &peer.attempt) {
    attempt.slot = peer.id;
    displaced = slots_.enter(peer.id, source);
    if (const auto it = displaced ? peers_.find(*displaced) : peers_.end(); it != peers_.end()) {
      displaced_number = it->second.attempt.number;
    }
  }
  const Stay stay(*this);
  lock.unlock();
  if (displaced_number != 0) {
    fail_attempt(*displaced, displaced_number,
                 {errc::resource_limit, "newer handshakes have taken the place of one that wasn't followed up"});
  }

  try {
    answer.endpoint =
        hooks_.accept(host, question.endpoint, deadline, link_handler(question.sender_id, number, host, nullptr));
  } catch (...) {
    const Failure failure = failure_being_handled();
    std::vector<Waiter> told;
    drop_attempt(question.sender_id, number, failure, told);
    tell(told, failure);
    refuse(reply, question.sender_id, failure);
    return;
  }
  answer.status = InitAnswer::ok;
  answer.timeout_ms = milliseconds_until(deadline);
  reply(encode_side_message(answer));
}

/// The attempt of the peer itself takes the place of this side's dial where that waits for it, and that of one whom nobody
/// knows yet a place that is free. Else they are beside it, and the dial goes on: it may be an old question of the peer's,
/// whose connection will never come.
KVFERRY_INLINE PeerDirectory::Attempt& PeerDirectory::place_for(Peer& peer, const InitQuestion& question, bool known) {
  const bool first = !peer.description && peer.attempt.number == 0;
  if ((known && (!peer.dialing() || peer.attempt.yielded) && !peer.attempt.moves) || first) {
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

KVFERRY_INLINE LinkHandler PeerDirectory::link_handler(std::string peer_id, std::uint64_t attempt,
                                                       std::shared_ptr<Host> host, std::shared_ptr<Dial> dial) {
  return [weak = weak_from_this(), peer_id = std::move(peer_id), attempt, host = std::move(host),
          dial = std::move(dial)](std::error_code ec, std::shared_ptr<Link> link, std::string diagnostic) {
    const Visit self(weak);
    if (self && !ec && !link) {
      self->fail_attempt(peer_id, attempt, {errc::handshake_failed, "no connection was made"});
    } else if (self && !ec) {
      self->publish(peer_id, attempt, host, std::move(link));
    } else if (self) {
      self->fail_attempt(peer_id, attempt, {ec, std::move(diagnostic)});
    } else if (link) {
      link->shut(errc::closed, "the channel is closed");
    }
  };
}

KVFERRY_INLINE void PeerDirectory::fail_attempt(const std::string& peer_id, std::uint64_t number,
                                                const Failure& failure) {
  std::vector<Waiter> told;
  const auto accepting = drop_attempt(peer_id, number, failure, told);
  if (!accepting) {
    return;
  }
  // Before anybody hears of it, who may then ask for the statistics.
  (*accepting ? refused_ : failed_dials_).count(failure.code);
  // Whoever called for a connection hears of it; of a peer's attempt nobody here does.
  logger_->log(*accepting ? LogLevel::warning : LogLevel::info, *accepting ? "accept_failed" : "connect_failed",
               peer_id, failure.code, [&] { return failure.sentence; });
  tell(told, failure);
}

KVFERRY_INLINE void PeerDirectory::tell(const std::vector<Waiter>& told, const Failure& failure) {
  for (const auto& waiting : told) {
    waiting.tell(failure);
  }
}

/// @param told those who are to hear of it. @return whether it was a peer's attempt; nothing if it is over already.
KVFERRY_INLINE std::optional<bool> PeerDirectory::drop_attempt(const std::string& peer_id, std::uint64_t number,
                                                               const Failure& failure, std::vector<Waiter>& told) {
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
      // A call that came later may have more time than the attempt had, and one that waited for the peer's own attempt
      // has had no attempt yet.
      const bool again = !peer->url.empty() && (was_acceptance || was_move || had_its_time || given_up);
      const auto rest = std::stable_partition(peer->waiting.begin(), peer->waiting.end(),
                                              [&](const Waiter& waiting) { return !again || waiting.deadline <= now; });
      std::move(peer->waiting.begin(), rest, std::back_inserter(told));
      peer->waiting.erase(peer->waiting.begin(), rest);
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
  Failure why{errc::connection_lost, "the connection was replaced by a new one"};
  std::uint64_t before = 0;
  bool reconnected = false;
  bool accepting = false;
  Displaced displaced;
  std::shared_ptr<Link> made;
  std::vector<std::shared_ptr<Operation>> askers;
  Failure failed;
  {
    const Lock lock(mutex_);
    Peer* const peer = current(peer_id, number);
    Attempt* const attempt = peer == nullptr ? nullptr : peer->find(number);
    if (attempt == nullptr) {
      replaced.push_back(std::move(link));
    } else if (host->failed()) {
      replaced.push_back(std::move(link));
      failed = {errc::connection_lost, "the connection broke as soon as it was made"};
    } else if (attempt->accepting && !attempt->known && peer->lives()) {
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
      if (peer->description && !attempt->known) {
        before = peer->instance.incarnation;
        why = {errc::peer_restarted, "the peer is another one: incarnation " + std::to_string(before) + " is now " +
                                         std::to_string(host->peer().incarnation)};
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
      peer->fenced_until = std::max(peer->fenced_until, attempt->fenced_until);
      peer->instance = std::move(attempt->instance);
      peer->local_id = attempt->local_id;
      if (!attempt->url.empty()) {
        if (!accepting) {
          remember_kvferry(attempt->url);  // where the peer only says that it answers, nobody has answered yet
        }
        peer->url = attempt->url;
      }
      // Whoever says that the peer has moved has the last word.
      Attempt move = peer->attempt.moves && attempt != &peer->attempt ? std::exchange(peer->attempt, {}) : Attempt();
      end_attempts(*peer);
      peer->attempt = std::move(move);
      end_probe(*peer);
      std::erase_if(links_, [](const Published& old) { return old.link.expired(); });
      links_.push_back({peer_id, link});
      // Also one that has failed, and is being shut by whoever noticed: not before nothing is received on it any more is
      // the peer to start anything on the new one.
      replaced = links_but(link, peer_id);
      askers = take_askers(*peer);
      peer->link = std::move(link);
      peer->host = host.get();
      peer->description = host->description();
      peer->url = with_zone_of(peer->url, seen_at);
      peer->state = Peer::State::handing_over;
      events_->push({before != 0 ? PeerEventKind::restarted : PeerEventKind::connected, peer_id,
                     peer->description->incarnation,
                     before != 0 ? make_error_code(errc::peer_restarted) : std::error_code()});
      if (!peer->attempt.moves) {
        std::move(peer->movers.begin(), peer->movers.end(), std::back_inserter(peer->waiting));
        peer->movers.clear();
      }
    }
  }
  if (made) {
    ++(accepting ? accepted_ : dialed_);
    reconnected_ += reconnected ? 1 : 0;
    logger_->log(LogLevel::info, "peer_connected", peer_id, {}, [&] {
      return std::string(reconnected ? "again, " : "") + made->path_with_remark() + ", incarnation " +
             std::to_string(host->peer().incarnation);
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
    fail_attempt(peer_id, number, failed);
  }
  hand_over(peer_id, published);
  route_later(std::move(askers), Routed::has_waited);
}

}  // namespace kvferry::kit
