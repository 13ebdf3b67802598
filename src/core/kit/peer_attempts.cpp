// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "core/host_address.hpp"
#include "core/text.hpp"

#include "checks.hpp"
#include "peer.hpp"
#include "peer_directory.hpp"

namespace kvferry::kit {
namespace {

/// How long a side that yielded waits for the other's dial before it asks again: the other may not get through.
constexpr std::chrono::milliseconds yield_patience{250};

/// As which of kvferry's own codes a refusal travels: the numbers of other categories mean nothing to a peer.
errc code_for_peer(const std::error_code& cause) {
  if (cause.category() == error_category()) {
    return static_cast<errc>(cause.value());
  }
  if (cause == condition::peer_failed) {
    return errc::connection_lost;
  }
  return cause == std::errc::not_enough_memory ? errc::resource_limit : errc::handshake_failed;
}

}  // namespace

std::uint64_t PeerDirectory::begin_attempt(Peer& peer, Clock::time_point deadline) {
  end_attempt(peer);
  const std::uint64_t attempt = ++last_attempt_;
  peer.attempt = attempt;
  peer.attempt_deadline = deadline;
  peer.expiry = std::make_shared<Expiry>([weak = weak_from_this(), id = peer.id, attempt] {
    if (const Visit self(weak); self) {
      self->fail_attempt(id, attempt, {errc::timed_out, "the connection was not usable in time"});
    }
  });
  deadlines_->add(deadline, peer.expiry);
  return attempt;
}

void PeerDirectory::end_attempt(Peer& peer) {
  if (peer.expiry) {
    deadlines_->remove(peer.attempt_deadline, *peer.expiry);
  }
  peer.expiry.reset();
  peer.dial.reset();
  peer.question = {};
  peer.yielded = false;
  peer.gave_yield = false;
  peer.attempt = ++last_attempt_;  // whatever of it is still under way is dropped
}

PeerDirectory::Peer* PeerDirectory::current(const std::string& peer_id, std::uint64_t attempt) {
  const auto it = peers_.find(peer_id);
  return closed_ || it == peers_.end() || it->second.attempt != attempt ? nullptr : &it->second;
}

void PeerDirectory::start_dial(Peer& peer, Lock& lock) {
  Clock::time_point deadline = Clock::time_point::min();
  for (const auto& waiting : peer.waiting) {
    deadline = std::max(deadline, waiting.deadline);
  }
  peer.state = Peer::State::dialing;
  const std::uint64_t attempt = begin_attempt(peer, deadline);
  const std::string peer_id = peer.id;
  const std::string url = peer.url;
  InitQuestion question;
  question.transport = hooks_.name;
  question.sender_id = peer.local_id;
  question.receiver_id = peer.id;
  question.incarnation = incarnation_;
  question.init_url = own_init_url_;
  question.regions = describe_regions(options_.regions);
  const Stay stay(*this);
  lock.unlock();

  std::shared_ptr<Dial> dial;
  try {
    dial = hooks_.dial(peer_id);
    question.endpoint = dial->local_endpoint();
  } catch (const std::system_error& error) {
    fail_attempt(peer_id, attempt, {error.code(), error.what()});
    return;
  }
  const SideMessage message = encode_side_message(question);
  lock.lock();
  Peer* const still = current(peer_id, attempt);
  if (still != nullptr) {
    still->dial = dial;
    still->question = message;
  }
  lock.unlock();
  if (still != nullptr) {
    ask(peer_id, attempt, url, message, deadline);
  }
}

void PeerDirectory::ask(const std::string& peer_id, std::uint64_t attempt, const std::string& url,
                        const SideMessage& question, Clock::time_point deadline) {
  service_->ask(url, question, deadline,
                [weak = weak_from_this(), peer_id, attempt](std::error_code ec, const SideMessage& answer,
                                                            std::string diagnostic, const std::string& reached) {
                  if (const Visit self(weak); self) {
                    self->dial_answered(peer_id, attempt, {ec, std::move(diagnostic)}, answer, reached);
                  }
                });
}

void PeerDirectory::ask_again(const std::string& peer_id, std::uint64_t attempt) {
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr || !peer->yielded) {
    return;
  }
  peer->yielded = false;
  const std::string url = peer->url;
  const SideMessage question = peer->question;
  const auto deadline = peer->attempt_deadline;
  lock.unlock();
  ask(peer_id, attempt, url, question, deadline);
}

void PeerDirectory::dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure,
                                  const SideMessage& message, const std::string& reached_address) {
  InitAnswer answer;
  if (!failure) {
    answer = decode_side_message<InitAnswer>(message, failure.code);
    if (failure) {
      failure = {errc::handshake_failed,
                 "answered the handshake with " + in_quotes(message.type()) + ": " + failure.code.message()};
    }
  }
  if (!failure && answer.status != InitAnswer::ok && answer.status != InitAnswer::yield) {
    failure = {errc::handshake_failed, "answered the handshake with status " + in_quotes(answer.status)};
  }
  if (!failure) {
    failure = check_handshake({hooks_.name, incarnation_, options_.regions, options_.require_equal_page_sizes}, peer_id,
                              answer.version, answer.transport, answer.incarnation, answer.regions);
  }
  if (failure) {
    fail_attempt(peer_id, attempt, std::move(failure));
    return;
  }
  Lock lock(mutex_);
  Peer* const peer = current(peer_id, attempt);
  if (peer == nullptr) {
    return;
  }
  if (answer.status == InitAnswer::yield) {
    peer->yielded = true;
    deadlines_->add(Clock::now() + yield_patience,
                    std::make_shared<Expiry>([weak = weak_from_this(), peer_id, attempt] {
                      if (const Visit self(weak); self) {
                        self->ask_again(peer_id, attempt);
                      }
                    }));
    return;
  }
  auto host = std::make_shared<Host>(
      weak_from_this(), notifications_, options_.regions,
      PeerDescription{peer_id, answer.incarnation, peer->url, reached_address, read_regions(answer.regions)});
  const auto dial = peer->dial;
  const auto deadline = peer->attempt_deadline;
  lock.unlock();
  dial->connect(host, answer.endpoint, deadline, link_handler(peer_id, attempt, host, dial));
}

Failure PeerDirectory::check(const InitQuestion& question) const {
  if (Failure failure = check_id(question.sender_id, "the handshake's sender")) {
    return failure;
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
  return check_handshake({hooks_.name, incarnation_, options_.regions, options_.require_equal_page_sizes},
                         question.sender_id, question.version, question.transport, question.incarnation,
                         question.regions);
}

void PeerDirectory::answer(const SideMessage& message, HandshakeService::Reply reply) {
  const auto refuse = [&](const Failure& cause) {
    reply(encode_side_message(SideMessageError{static_cast<int>(code_for_peer(cause.code)), cause.sentence}));
  };
  std::error_code ec;
  const auto question = decode_side_message<InitQuestion>(message, ec);
  if (const Failure failure = ec ? Failure{ec, "malformed " + in_quotes(message.type())} : check(question)) {
    refuse(failure);
    return;
  }

  InitAnswer answer;
  answer.status = InitAnswer::ok;
  answer.transport = hooks_.name;
  answer.incarnation = incarnation_;
  answer.regions = describe_regions(options_.regions);

  Lock lock(mutex_);
  Peer* const peer = closed_ ? nullptr : find_or_add(question.sender_id);
  if (peer == nullptr) {
    const Failure failure =
        closed_ ? Failure{errc::closed, "the channel is closed"}
                : Failure{errc::resource_limit,
                          "this channel is connected to " + std::to_string(options_.max_peers) + " peers already"};
    lock.unlock();
    refuse(failure);
    return;
  }
  const bool this_side_wins = incarnation_ < question.incarnation;
  if (peer->state == Peer::State::dialing && !peer->yielded && !peer->gave_yield && this_side_wins) {
    peer->gave_yield = true;
    answer.status = InitAnswer::yield;
    lock.unlock();
    reply(encode_side_message(answer));
    return;
  }
  peer->local_id = question.receiver_id;
  const std::string told_url = url_for_others(question.init_url);
  if (!told_url.empty()) {
    peer->url = told_url;
  }
  std::shared_ptr<Link> stale;
  if (peer->link && peer->description->incarnation != question.incarnation) {
    stale = std::move(peer->link);
    peer->last_failure = {errc::peer_restarted, "the peer restarted"};
  }
  if (!peer->link) {
    peer->state = Peer::State::accepting;
  }
  const auto deadline = deadline_after(options_.handshake_timeout);
  const std::uint64_t attempt = begin_attempt(*peer, deadline);
  const Stay stay(*this);
  lock.unlock();
  if (stale) {
    stale->shut(errc::peer_restarted, "the peer restarted");
  }

  auto host = std::make_shared<Host>(
      weak_from_this(), notifications_, options_.regions,
      PeerDescription{question.sender_id, question.incarnation, told_url, {}, read_regions(question.regions)});
  try {
    answer.endpoint =
        hooks_.accept(host, question.endpoint, deadline, link_handler(question.sender_id, attempt, host, nullptr));
  } catch (const std::system_error& error) {
    const Failure failure{error.code(), error.what()};
    fail_attempt(question.sender_id, attempt, failure);
    refuse(failure);
    return;
  }
  reply(encode_side_message(answer));
}

LinkHandler PeerDirectory::link_handler(std::string peer_id, std::uint64_t attempt, std::shared_ptr<Host> host,
                                        std::shared_ptr<Dial> dial) {
  return [weak = weak_from_this(), peer_id = std::move(peer_id), attempt, host = std::move(host),
          dial = std::move(dial)](std::error_code ec, std::shared_ptr<Link> link, std::string diagnostic) {
    const Visit self(weak);
    if (self && !ec) {
      self->publish(peer_id, attempt, host, std::move(link));
    } else if (self) {
      self->fail_attempt(peer_id, attempt, {ec, std::move(diagnostic)});
    } else if (link) {
      link->shut(errc::closed, "the channel is closed");
    }
  };
}

void PeerDirectory::fail_attempt(const std::string& peer_id, std::uint64_t attempt, Failure failure) {
  std::vector<Waiter> told;
  {
    Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    if (peer == nullptr) {
      return;
    }
    const auto now = Clock::now();
    const bool was_acceptance = peer->state == Peer::State::accepting;
    const bool had_its_time = now >= peer->attempt_deadline;
    const bool has_link = peer->link != nullptr;
    end_attempt(*peer);
    if (has_link) {
      return;  // the peer did not get through with a second connection; the first one is still there
    }
    peer->state = Peer::State::unconnected;
    peer->out_of_use_since = now;
    peer->last_failure = failure;
    // A call that came later may have more time than the attempt had, and one that waited for the peer's own attempt
    // has had no attempt yet.
    const bool again = !peer->url.empty() && (was_acceptance || had_its_time);
    const auto rest = std::stable_partition(peer->waiting.begin(), peer->waiting.end(),
                                            [&](const Waiter& waiting) { return !again || waiting.deadline <= now; });
    told.assign(std::make_move_iterator(peer->waiting.begin()), std::make_move_iterator(rest));
    peer->waiting.erase(peer->waiting.begin(), rest);
    if (!peer->waiting.empty()) {
      start_dial(*peer, lock);
    } else if (!peer->description) {
      peers_.erase(peer_id);
    }
  }
  for (const auto& waiting : told) {
    waiting.tell(failure);
  }
}

void PeerDirectory::publish(const std::string& peer_id, std::uint64_t attempt, const std::shared_ptr<Host>& host,
                            std::shared_ptr<Link> link) {
  const Link* const published = link.get();
  const std::string seen_at = link->remote_address();
  std::shared_ptr<Link> replaced;
  bool broken = false;
  {
    const Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    broken = host->failed();
    if (peer == nullptr || broken) {
      replaced = std::move(link);
    } else {
      end_attempt(*peer);
      std::erase_if(links_, [](const std::weak_ptr<Link>& weak) { return weak.expired(); });
      links_.push_back(link);
      replaced = std::exchange(peer->link, std::move(link));
      if (!peer->description) {
        peer->acknowledged_incarnation = host->peer().incarnation;
      }
      peer->description = host->description();
      peer->url = with_zone_of(peer->url, seen_at);
      peer->state = Peer::State::handing_over;
    }
  }
  if (replaced) {
    replaced->shut(errc::connection_lost, "the connection was replaced by a new one");
  }
  if (broken) {
    fail_attempt(peer_id, attempt, {errc::connection_lost, "the connection broke as soon as it was made"});
  }
  hand_over(peer_id, published);
}

}  // namespace kvferry::kit
