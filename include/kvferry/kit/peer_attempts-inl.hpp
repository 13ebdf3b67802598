// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/detail/text.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// How long a side that yielded to the other's dial, or accepted it, waits for it before it asks itself: the other may not
/// get through.
inline constexpr std::chrono::milliseconds patience_with_the_other{250};
/// Before a peer that has let go of an attempt is asked again; twice as long each time, up to the longest.
inline constexpr std::chrono::milliseconds first_pause_of_one_let_go{50};
inline constexpr unsigned pause_doublings_of_one_let_go = 4;
/// How much later than its attempt's a call's timer may be.
inline constexpr std::chrono::seconds last_awaited_lasts{2};
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
  // A peer that comes while the channel is being closed has done nothing out of order.
  const auto level = cause.code == errc::closed ? LogLevel::info : LogLevel::warning;
  logger_->log(level, conflict ? "identity_conflict" : "handshake_refused", peer_id, cause.code,
               [&] { return cause.sentence; });
  reply(refusal(code_for_peer(cause.code), cause.sentence));
}

KVFERRY_INLINE void PeerDirectory::begin_attempt(const Peer& peer, Attempt& attempt, Clock::time_point deadline) {
  const std::uint64_t number = ++last_number_;
  auto expiry = Expiry::make([weak = weak_from_this(), id = peer.id, number] {
    if (const Visit self(weak); self) {
      self->fail_attempt(id, number,
                         {errc::timed_out, "the connection was not usable in time: " + self->awaited(id, number)});
    }
  });
  deadlines_->add(deadline, expiry);
  attempt.number = number;  // from here on there is one, which its deadline ends
  attempt.expiry = std::move(expiry);
  attempt.deadline = deadline;
}

KVFERRY_INLINE void PeerDirectory::set_deadline(Attempt& attempt, Clock::time_point deadline) {
  deadlines_->remove(attempt.deadline, *attempt.expiry);
  attempt.deadline = deadline;
  deadlines_->add(deadline, attempt.expiry);
}

/// Answers to it that are still under way are dropped: no attempt has its number any more.
KVFERRY_INLINE void PeerDirectory::end_attempt(Attempt& attempt) {
  if (attempt.expiry) {
    deadlines_->remove(attempt.deadline, *attempt.expiry);
  }
  slots_.leave(attempt.number);
  if (attempt.host) {
    if_memory_lasts([&] { attempt.host->abandon(); });
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
                                              Lock& lock) {
  start_dial(peer, local_id, url, lock, {});
}

KVFERRY_INLINE void PeerDirectory::start_dial(Peer& peer, const std::string& local_id, const std::string& url,
                                              Lock& lock, const Continued& continued) {
  Clock::time_point deadline = Clock::now();
  for (const auto* const list : {&peer.waiting, &peer.movers}) {
    for (const auto& waiting : *list) {
      deadline = std::max(deadline, waiting.deadline);
    }
  }
  deadline += longer_than_the_call;
  end_attempt(peer.attempt);
  Attempt& made = peer.attempt;
  InitQuestion question;
  const std::string peer_id = peer.id;
  // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): the peer may be gone when it is asked
  const std::string question_url = url;
  try {
    begin_attempt(peer, made, deadline);
    made.local_id = local_id;
    made.url = url;
    made.moves = peer.link != nullptr || continued.moves;
    made.told_again = continued.told_again;
    made.times_let_go = continued.times_let_go;
    made.let_go_because = continued.let_go_because;
    made.told_regions = regions_->now();
    question = question_to(peer, local_id, url, *made.told_regions);
    made.instance.own_secret = *question.secret;
  } catch (...) {
    end_attempt(made);  // nobody is asked, and the next call is not to wait for an answer
    throw;
  }
  const std::uint64_t attempt = made.number;
  question.attempt = attempt;
  made.told_at = Clock::now();
  const Stay stay(*this);
  lock.unlock();

  try {
    const std::shared_ptr<Dial> dial = hooks_.dial(peer_id);
    question.endpoint = dial->local_endpoint();
    question.timeout_ms = milliseconds_until(deadline);
    const SideMessage message = encode_side_message(question);
    {
      const Lock relock(mutex_);
      Peer* const still = current(peer_id, attempt);
      if (still == nullptr) {
        return;
      }
      still->attempt.dial = dial;
      still->attempt.question = message;
    }
    ask(peer_id, attempt, question_url, message, deadline);
  } catch (...) {
    fail_attempt(peer_id, attempt, failure_being_handled());
  }
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
    call_later(patience_with_the_other, &PeerDirectory::dial_beside, peer.id, peer.attempt.number);
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
  slots_.leave(peer->attempt.number);
  make_room_for_candidate(*peer);
  peer->candidates.push_back(std::exchange(peer->attempt, {}));
  start_dial(*peer, lock);
}

KVFERRY_INLINE void PeerDirectory::call_later(Clock::duration pause,
                                              void (PeerDirectory::*what)(const std::string&, std::uint64_t),
                                              const std::string& peer_id, std::uint64_t attempt) {
  deadlines_->add(Clock::now() + pause, Expiry::make([weak = weak_from_this(), what, peer_id, attempt] {
                    if (const Visit self(weak); self) {
                      (*self.operator->().*what)(peer_id, attempt);
                    }
                  }));
}

/// A peer in a crowd lets go of attempts whose connections take long, and closes the connections that come then. It looks the
/// same where a peer goes, which is noticed when it is asked again.
KVFERRY_INLINE void PeerDirectory::dial_failed(const std::string& peer_id, std::uint64_t attempt,
                                               const Failure& failure, bool was_cut_off) {
  bool again = false;
  std::shared_ptr<Dial> dial;  // destroyed without the lock
  if_memory_lasts([&] {
    const Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    if (peer == nullptr || peer->attempt.number != attempt || !peer->attempt.crowded || !was_cut_off ||
        failure.code != condition::retryable || failure.code == condition::timed_out) {
      return;
    }
    Attempt& made = peer->attempt;
    made.let_go_because = failure.sentence.empty() ? failure.code.message() : failure.sentence;
    const Clock::duration pause =
        first_pause_of_one_let_go * (1U << std::min(made.times_let_go, pause_doublings_of_one_let_go));
    // Not the whole time that is left.
    const Clock::duration most =
        std::max<Clock::duration>((made.deadline - Clock::now()) / 2, first_pause_of_one_let_go);
    call_later(std::min(pause, most), &PeerDirectory::dial_anew, peer_id, attempt);
    ++made.times_let_go;
    made.let_go = true;
    made.fences.clear();  // nothing comes by it any more
    dial = std::move(made.dial);
    again = true;
  });
  if (again) {
    failed_dials_.count(failure.code);
    logger_->log(LogLevel::info, "connect_again", peer_id, failure.code, [&] { return failure.sentence; });
  } else {
    fail_attempt(peer_id, attempt, failure);
  }
}

KVFERRY_INLINE void PeerDirectory::dial_anew(const std::string& peer_id, std::uint64_t attempt) {
  Failure failure{errc::timed_out, {}};
  std::vector<Waiter> waiting;  // destroyed without the lock, as the others
  std::vector<Waiter> movers;
  {
    Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    if (peer == nullptr || peer->attempt.number != attempt) {
      return;
    }
    Attempt& made = peer->attempt;
    const auto waits = [now = Clock::now()](const Waiter& waiter) { return waiter.deadline > now && !waiter.over(); };
    if (std::ranges::any_of(made.moves ? peer->movers : peer->waiting, waits)) {
      const std::string local_id = made.local_id;
      const std::string url = made.url;
      start_dial(*peer, local_id, url, lock,
                 {made.moves, made.told_again, made.times_let_go, std::move(made.let_go_because)});
      return;
    }
    if (!peer->link && std::ranges::any_of(peer->waiting, waits)) {
      start_dial(*peer, lock);  // for them nobody has moved
      return;
    }
    std::string awaited = awaited_of_one_let_go(made);
    failure.sentence = "the connection was not usable in time: " + awaited;
    peer->last_failure = failure;
    peer->last_awaited = std::move(awaited);
    peer->out_of_use_since = Clock::now();
    peer->last_awaited_until = peer->out_of_use_since + last_awaited_lasts;
    waiting.swap(peer->waiting);
    movers.swap(peer->movers);
    end_attempt(made);
  }
  failed_dials_.count(failure.code);
  logger_->log(LogLevel::info, "connect_failed", peer_id, failure.code, [&] { return failure.sentence; });
}

KVFERRY_INLINE std::string PeerDirectory::awaited_of_one_let_go(const Attempt& attempt) {
  return "the peer has many handshakes, and is to be asked again: " + attempt.let_go_because;
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
    call_later(patience_with_the_other, &PeerDirectory::ask_again, peer_id, attempt);
    return;
  }
  if (peer->fenced_at >= answered.told_at && !answered.told_again) {
    // The peer is to know of the fence, too.
    const std::string local_id = answered.local_id;
    const std::string url = answered.url;
    start_dial(*peer, local_id, url, lock,
               {answered.moves, true, answered.times_let_go, std::move(answered.let_go_because)});
    return;
  }
  answered.instance.incarnation = answer.incarnation;
  answered.fenced_until = fenced_until(answer.fenced_us);
  answered.instance.its_secret = answer.secret.value_or(Bytes());
  answered.crowded = answer.crowded.value_or(false);
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

KVFERRY_INLINE LinkHandler PeerDirectory::link_handler(std::string peer_id, std::uint64_t attempt,
                                                       std::shared_ptr<Host> host, std::shared_ptr<Dial> dial) {
  return [weak = weak_from_this(), peer_id = std::move(peer_id), attempt, host = std::move(host),
          dial = std::move(dial)](std::error_code ec, std::shared_ptr<Link> link, std::string diagnostic) {
    const Visit self(weak);
    if (self && !ec && !link) {
      self->fail_attempt(peer_id, attempt, {errc::handshake_failed, "no connection was made"});
    } else if (self && !ec) {
      self->publish(peer_id, attempt, host, std::move(link));
    } else if (self && dial) {
      self->dial_failed(peer_id, attempt, {ec, std::move(diagnostic)}, is_cut_off(ec) || dial->was_cut_off());
    } else if (self) {
      self->fail_attempt(peer_id, attempt, {ec, std::move(diagnostic)});
    } else if (link) {
      link->shut(errc::closed, "the channel is closed");
    }
  };
}

}  // namespace kvferry::kit
