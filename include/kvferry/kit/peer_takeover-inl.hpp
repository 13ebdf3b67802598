// SPDX-License-Identifier: Apache-2.0
#pragma once

// Identities: somebody who says that he is a peer that is connected, and a peer that is at another
// url now.
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/peer_metadata.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// A peer that answers a probe within this time lives.
inline constexpr std::chrono::seconds probe_patience{1};
/// How long a link whose probe was not answered counts as dead without another probe, for who comes then. Their connections may
/// take longer.
inline constexpr std::chrono::seconds silence_lasts{5};
inline constexpr std::size_t max_newcomers = 16;

}  // namespace internal

KVFERRY_INLINE void PeerDirectory::take(InitQuestion question, HandshakeService::Reply reply) {
  Lock lock(mutex_);
  const auto it = peers_.find(question.sender_id);
  const bool known = it != peers_.end() && it->second.instance.shown_by(question.incarnation, question.secret);
  if (question.who.value_or(false) && !closed_) {
    InitAnswer answer = describe_self(*regions_->now());
    answer.status = InitAnswer::here;
    if (known) {
      answer.secret = it->second.instance.own_secret;
    }
    lock.unlock();
    reply(encode_side_message(answer));
    return;
  }
  if (!closed_ && (it == peers_.end() || !(it->second.named || it->second.link)) && !may_link(reply.source())) {
    lock.unlock();
    refuse(reply, question.sender_id, {errc::resource_limit, too_many_links});
    return;
  }
  Peer* const peer = closed_ ? nullptr : find_or_add(question.sender_id, false);
  if (peer == nullptr) {
    const Failure failure =
        closed_ ? Failure{errc::closed, "the channel is closed"}
                : Failure{errc::resource_limit,
                          "this channel is connected to " + std::to_string(options_.max_peers) + " peers already"};
    lock.unlock();
    refuse(reply, question.sender_id, failure);
    return;
  }
  if (known || !peer->lives()) {
    accept(*peer, question, std::move(reply), lock);
    return;
  }
  if (peer->newcomers.size() >= max_newcomers) {
    lock.unlock();
    refuse(reply, question.sender_id,
           {errc::resource_limit, "too many say at once that they are this peer, which is connected"});
    return;
  }
  peer->newcomers.push_back({std::move(question), std::move(reply)});
  if (peer->probe == 0) {
    try {
      start_probe(*peer, lock);
    } catch (...) {
      if (lock.owns_lock()) {
        peer->newcomers.pop_back();  // who hears that the handshake failed
      }
      throw;
    }
  }
}

KVFERRY_INLINE void PeerDirectory::start_probe(Peer& peer, Lock& lock) {
  const std::uint64_t probe = ++last_number_;
  const auto deadline = Clock::now() + probe_patience;
  auto expiry = Expiry::make([weak = weak_from_this(), id = peer.id, probe] {
    if (const Visit self(weak); self) {
      self->probe_unanswered(id, probe);
    }
  });
  std::function<void()> answered = [weak = weak_from_this(), id = peer.id, probe] {
    if (const Visit self(weak); self) {
      self->probe_answered(id, probe);
    }
  };
  // Up to here, where memory is used up, there is no probe, and who comes next begins one. From here on its time ends it.
  deadlines_->add(deadline, expiry);
  peer.probe = probe;
  peer.last_probe = probe;
  peer.probe_deadline = deadline;
  peer.probe_expiry = std::move(expiry);
  const auto link = peer.link;
  const Stay stay(*this);
  lock.unlock();
  link->probe(std::move(answered));
}

KVFERRY_INLINE void PeerDirectory::end_probe(Peer& peer) {
  if (peer.probe_expiry) {
    deadlines_->remove(peer.probe_deadline, *peer.probe_expiry);
  }
  peer.probe_expiry.reset();
  peer.probe = 0;
  peer.last_probe = 0;
  peer.silent_until = {};
  let_newcomers_in(peer);
}

/// The peer's state has changed: its waiters ask anew, on another thread than this.
KVFERRY_INLINE void PeerDirectory::let_newcomers_in(Peer& peer) {
  if (peer.newcomers.empty()) {
    return;
  }
  deadlines_->add(Clock::now(), Expiry::make([weak = weak_from_this(), id = peer.id] {
                    if (const Visit self(weak); self) {
                      self->take_newcomers(id);
                    }
                  }));
}

KVFERRY_INLINE void PeerDirectory::take_newcomers(const std::string& peer_id) {
  std::vector<Peer::Newcomer> newcomers;
  {
    const Lock lock(mutex_);
    if (const auto it = peers_.find(peer_id); it != peers_.end() && it->second.probe == 0) {
      newcomers.swap(it->second.newcomers);
    }
  }
  for (auto& [question, reply] : newcomers) {
    const std::string source = reply.source();
    const std::string sender_id = question.sender_id;
    const auto shared_reply = std::make_shared<HandshakeService::Reply>(std::move(reply));
    // There are few newcomers of a peer, and what they said is no longer as it came.
    constexpr std::size_t bytes = 1024;
    const auto answer = [weak = weak_from_this(), question = std::move(question), shared_reply] {
      try {
        if (const Visit self(weak); self) {
          self->take(question, std::move(*shared_reply));
        }
      } catch (...) {
        // The reply is gone without having been made, so the newcomer has heard that the handshake failed.
      }
    };
    if (!hooks_.run_accept(source, bytes, answer)) {
      refuse(*shared_reply, sender_id, {errc::resource_limit, "too many handshakes wait here"});
    }
  }
}

KVFERRY_INLINE void PeerDirectory::probe_answered(const std::string& peer_id, std::uint64_t probe) {
  std::vector<Peer::Newcomer> newcomers;
  std::uint64_t taken_by = 0;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.last_probe != probe) {
      return;
    }
    Peer& peer = it->second;
    peer.silent_until = {};  // also where the answer comes late: nobody has taken its place yet
    if (peer.probe != probe) {
      return;
    }
    deadlines_->remove(peer.probe_deadline, *peer.probe_expiry);
    peer.probe_expiry.reset();
    peer.probe = 0;
    newcomers.swap(peer.newcomers);
    taken_by = peer.instance.incarnation;
  }
  for (auto& [question, reply] : newcomers) {
    refuse_conflict(taken_by, question, reply);
  }
}

KVFERRY_INLINE void PeerDirectory::refuse_conflict(std::uint64_t taken_by, const InitQuestion& question,
                                                   HandshakeService::Reply& reply) {
  const std::string who =
      "is connected as '" + question.sender_id + "' and has just answered: incarnation " + std::to_string(taken_by);
  const Failure failure{errc::identity_conflict, question.incarnation == taken_by
                                                     ? "this server has another name already: this very channel " + who
                                                     : "another channel " + who +
                                                           "; the one that is refused is incarnation " +
                                                           std::to_string(question.incarnation)};
  ++identity_conflicts_;
  refuse(reply, question.sender_id, failure);
}

KVFERRY_INLINE void PeerDirectory::probe_unanswered(const std::string& peer_id, std::uint64_t probe) {
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.probe != probe) {
      return;
    }
    it->second.probe = 0;
    it->second.probe_expiry.reset();
    it->second.silent_until = Clock::now() + silence_lasts;
  }
  take_newcomers(peer_id);
}

/// One server may be known here by two names, with urls of different spellings: it knows this channel by the secret of the
/// first. Nobody else is shown it: it is the same address and port that answered.
KVFERRY_INLINE bool PeerDirectory::ask_as_known(const std::string& peer_id, std::uint64_t attempt,
                                                const std::string& reached_address) {
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr || peer->attempt.number != attempt || peer->attempt.as_known || reached_address.empty()) {
    return false;
  }
  Attempt& refused = peer->attempt;
  std::error_code ignored;
  const HostPort there = parse_url(HostPort{reached_address, parse_url(refused.url, ignored).port}.to_url(), ignored);
  const auto same = std::ranges::find_if(peers_, [&](const auto& entry) {
    const Peer& other = entry.second;
    return !other.instance.own_secret.empty() && other.instance.own_secret != refused.instance.own_secret &&
           parse_url(other.reached(other.url), ignored) == there;
  });
  if (same == peers_.end()) {
    return false;
  }
  auto question = decode_side_message<InitQuestion>(refused.question);
  question.secret = same->second.instance.own_secret;
  refused.as_known = true;
  refused.instance.own_secret = *question.secret;
  refused.question = encode_side_message(question);
  const std::string url = refused.url;
  const SideMessage message = refused.question;
  const auto deadline = refused.deadline;
  lock.unlock();
  ask(peer_id, attempt, url, message, deadline);
  return true;
}

KVFERRY_INLINE void PeerDirectory::ask_who(Peer& peer, const std::string& local_id, const std::string& url,
                                           std::uint64_t incarnation, Waiter waiter, Lock& lock) {
  InitQuestion question = question_to(peer, local_id, url, *regions_->now());
  question.who = true;
  const auto deadline = waiter.deadline + longer_than_the_call;
  const std::uint64_t number = ++last_number_;
  auto wanted = [over = waiter.over] { return !over(); };
  peer.asking.emplace(number, std::move(waiter));
  const Stay stay(*this);
  lock.unlock();
  ask_there(question.receiver_id, url, encode_side_message(question), deadline, std::move(wanted),
            [weak = weak_from_this(), local_id, peer_id = question.receiver_id, url, incarnation, number](
                std::error_code ec, const SideMessage& answer, std::string diagnostic, const std::string&) {
              if (const Visit self(weak); self) {
                self->who_answered(local_id, peer_id, url, incarnation, number, {ec, std::move(diagnostic)}, answer);
              }
            });
}

KVFERRY_INLINE void PeerDirectory::who_answered(const std::string& local_id, const std::string& peer_id,
                                                const std::string& url, std::uint64_t incarnation, std::uint64_t number,
                                                Failure failure, const SideMessage& message) {
  const InitAnswer answer = read_answer(peer_id, message, failure);
  if (!failure && incarnation != 0 && answer.incarnation != incarnation) {
    failure = another_incarnation(incarnation, answer.incarnation);
  }
  Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  using Asked = decltype(Peer::asking)::node_type;
  Asked asked = it == peers_.end() ? Asked() : it->second.asking.extract(number);
  if (asked.empty()) {
    return;  // told already: the peer was disconnected meanwhile
  }
  const Waiter& waiter = asked.mapped();
  if (failure) {
    lock.unlock();
    waiter.tell(failure);  // and the peer stays where it is
    return;
  }
  if (closed_ || !it->second.link) {
    connect(local_id, peer_id, url, 0, waiter, lock);
    return;
  }
  Peer& peer = it->second;
  const Failure known_otherwise = why_known_otherwise(peer, local_id);
  if (known_otherwise && answer.incarnation == peer.instance.incarnation) {
    lock.unlock();
    waiter.tell(known_otherwise);
    return;
  }
  if (!peer.instance.shown_by(answer.incarnation, answer.secret)) {
    move_to(peer, local_id, url, waiter, lock);
    return;
  }
  // It may have got there without a word on the connection that it had: it is asked on that one, too.
  peer.url = url;
  peer.asking.insert(std::move(asked));
  const auto link = peer.link;
  const auto judge = [weak = weak_from_this(), local_id, peer_id, url, number,
                      asked_on = std::weak_ptr(link)](bool lives) {
    if (const Visit self(weak); self) {
      self->moved_peer_judged(local_id, peer_id, url, number, asked_on.lock(), lives);
    }
  };
  deadlines_->add(Clock::now() + probe_patience, Expiry::make([judge] { judge(false); }));
  const Stay stay(*this);
  lock.unlock();
  link->probe([judge] { judge(true); });
}

/// The first verdict counts.
KVFERRY_INLINE void PeerDirectory::moved_peer_judged(const std::string& local_id, const std::string& peer_id,
                                                     const std::string& url, std::uint64_t number,
                                                     const std::shared_ptr<Link>& asked_on, bool lives) {
  Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  decltype(Peer::asking)::node_type asked;
  if (it != peers_.end()) {
    asked = it->second.asking.extract(number);
  }
  if (asked.empty()) {
    return;
  }
  const Waiter& waiter = asked.mapped();
  if (closed_ || !it->second.link) {
    connect(local_id, peer_id, url, 0, waiter, lock);
  } else if (lives || it->second.link != asked_on) {
    const Failure known_otherwise = why_known_otherwise(it->second, local_id);
    lock.unlock();
    waiter.tell(known_otherwise);
  } else {
    move_to(it->second, local_id, url, waiter, lock);
  }
}

KVFERRY_INLINE void PeerDirectory::move_to(Peer& peer, const std::string& local_id, const std::string& url,
                                           const Waiter& waiter, Lock& lock) {
  if (waiter.over()) {
    return;
  }
  peer.movers.push_back(arriving_at(local_id, peer.id, url, waiter));
  if (!peer.attempt.moves || peer.attempt.url != url) {
    start_dial(peer, local_id, url, lock);
  }
}

}  // namespace kvferry::kit
