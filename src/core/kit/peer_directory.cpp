// SPDX-License-Identifier: Apache-2.0
#include "peer_directory.hpp"

#include <algorithm>
#include <atomic>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "checks.hpp"

namespace kvferry::kit {

struct PeerDirectory::Peer {
  enum class State { unconnected, dialing, accepting, ready };

  std::string id;
  std::string local_id;  ///< How the peer knows this channel.
  std::string url;       ///< Where it answers handshakes, if known.
  State state = State::unconnected;
  bool yielded = false;       ///< Dialing, and told by the peer that its own dial counts.
  std::uint64_t attempt = 0;  ///< Number of the latest attempt.
  std::unique_ptr<Dial> dial;
  std::vector<WaitingFor> waiting;

  std::shared_ptr<Link> link;
  std::shared_ptr<const PeerDescription> description;  ///< Of the latest link; null if there never was one.
  std::uint64_t acknowledged_incarnation = 0;
  Failure last_failure;
};

/// Ends an attempt that did not lead to a link in time.
struct PeerDirectory::Attempt final : Expirable {
  Attempt(std::weak_ptr<PeerDirectory> owner, std::string id, std::uint64_t which)
      : directory(std::move(owner)), peer_id(std::move(id)), number(which) {}

  void expire() override {
    if (const auto owner = directory.lock()) {
      owner->fail_attempt(peer_id, number, {errc::timed_out, "the connection was not usable in time"});
    }
  }

  std::weak_ptr<PeerDirectory> directory;
  std::string peer_id;
  std::uint64_t number;
};

class PeerDirectory::Host final : public LinkHost {
 public:
  Host(std::weak_ptr<PeerDirectory> directory, std::shared_ptr<NotificationQueue> notifications,
       std::span<const MemoryRegion> regions, PeerDescription peer)
      : directory_(std::move(directory)),
        notifications_(std::move(notifications)),
        regions_(regions.begin(), regions.end()),
        peer_(std::make_shared<const PeerDescription>(std::move(peer))) {}

  [[nodiscard]] const PeerDescription& peer() const noexcept override { return *peer_; }
  [[nodiscard]] std::span<const MemoryRegion> local_regions() const noexcept override { return regions_; }

  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload) override {
    return notifications_->push({peer_->id, std::move(payload)});
  }

  void link_failed(const Link& link, std::error_code cause) override {
    failed_ = true;
    if (const auto directory = directory_.lock()) {
      directory->link_failed(peer_->id, link, cause);
    }
  }

  [[nodiscard]] std::shared_ptr<const PeerDescription> description() const { return peer_; }
  [[nodiscard]] bool failed() const noexcept { return failed_; }

 private:
  const std::weak_ptr<PeerDirectory> directory_;
  const std::shared_ptr<NotificationQueue> notifications_;
  const std::vector<MemoryRegion> regions_;
  const std::shared_ptr<const PeerDescription> peer_;
  std::atomic<bool> failed_{false};
};

PeerDirectory::PeerDirectory(const ChannelOptions& options, std::uint64_t incarnation, TransportHooks hooks,
                             std::shared_ptr<DeadlineQueue> deadlines,
                             std::shared_ptr<NotificationQueue> notifications)
    : options_(options),
      incarnation_(incarnation),
      hooks_(std::move(hooks)),
      deadlines_(std::move(deadlines)),
      notifications_(std::move(notifications)) {}

PeerDirectory::~PeerDirectory() = default;

void PeerDirectory::use(HandshakeService& service, std::string own_init_url) {
  const Lock lock(mutex_);
  service_ = &service;
  own_init_url_ = std::move(own_init_url);
}

void PeerDirectory::connect(const std::string& local_id, const std::string& peer_id, const std::string& url,
                            Clock::time_point deadline, Waiter waiter) {
  Lock lock(mutex_);
  if (closed_) {
    lock.unlock();
    waiter({errc::closed, {}});
    return;
  }
  auto it = peers_.find(peer_id);
  if (it == peers_.end()) {
    if (peers_.size() >= options_.max_peers) {
      lock.unlock();
      waiter({errc::resource_limit, "this channel knows " + std::to_string(options_.max_peers) + " peers already"});
      return;
    }
    it = peers_.try_emplace(peer_id).first;
    it->second.id = peer_id;
  }
  Peer& peer = it->second;
  peer.local_id = local_id;
  peer.url = url;
  if (peer.state == Peer::State::ready) {
    lock.unlock();
    waiter({});
    return;
  }
  peer.waiting.push_back({deadline, std::move(waiter)});
  if (peer.state == Peer::State::unconnected) {
    start_dial(peer, lock);
  }
}

void PeerDirectory::acknowledge(const std::string& peer_id) {
  const Lock lock(mutex_);
  if (const auto it = peers_.find(peer_id); it != peers_.end() && it->second.description) {
    it->second.acknowledged_incarnation = it->second.description->incarnation;
  }
}

void PeerDirectory::route(const std::shared_ptr<Operation>& operation) {
  const TransferRequest& request = operation->request();
  Lock lock(mutex_);
  const auto it = peers_.find(request.peer_id);
  if (closed_ || it == peers_.end() || !it->second.description) {
    const bool closed = closed_;
    lock.unlock();
    operation->finish(closed ? errc::closed : errc::unknown_peer);
    return;
  }
  Peer& peer = it->second;
  if (peer.state != Peer::State::ready) {
    if (peer.state == Peer::State::unconnected && peer.url.empty()) {
      const Failure failure = peer.last_failure;
      lock.unlock();
      operation->finish(failure.code, failure.sentence + ", and the peer's init url is not known");
      return;
    }
    peer.waiting.push_back({operation->deadline(), [weak = weak_from_this(), operation](const Failure& failure) {
                              const auto self = weak.lock();
                              if (failure || !self) {
                                operation->finish(self ? failure.code : errc::closed, failure.sentence);
                              } else if (!operation->stop_cause()) {
                                self->route(operation);
                              }
                            }});
    if (peer.state == Peer::State::unconnected) {
      start_dial(peer, lock);
    }
    return;
  }
  if (request.one_sided() && peer.acknowledged_incarnation != peer.description->incarnation) {
    const auto before = std::exchange(peer.acknowledged_incarnation, peer.description->incarnation);
    const auto now = peer.acknowledged_incarnation;
    lock.unlock();
    operation->finish(errc::peer_restarted, "the peer restarted: incarnation " + std::to_string(before) + " is now " +
                                                std::to_string(now) + "; page indexes agreed before are stale");
    return;
  }
  const auto link = peer.link;
  const auto description = peer.description;
  lock.unlock();
  if (Failure failure = check_against_peer(request, *description)) {
    operation->finish(failure.code, std::move(failure.sentence));
    return;
  }
  operation->start_on(link);
}

std::uint64_t PeerDirectory::begin_attempt(Peer& peer, Clock::time_point deadline) {
  peer.dial.reset();
  peer.yielded = false;
  const std::uint64_t attempt = ++peer.attempt;
  deadlines_->add(deadline, std::make_shared<Attempt>(weak_from_this(), peer.id, attempt));
  return attempt;
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
  lock.unlock();

  auto dial = hooks_.dial(peer_id);
  question.endpoint = dial->local_endpoint();
  lock.lock();
  Peer* const still = current(peer_id, attempt);
  if (still == nullptr) {
    return;
  }
  still->dial = std::move(dial);
  lock.unlock();
  service_->ask(url, encode_side_message(question), deadline,
                [weak = weak_from_this(), peer_id, attempt](std::error_code ec, const SideMessage& answer,
                                                            std::string diagnostic) {
                  if (const auto self = weak.lock()) {
                    self->dial_answered(peer_id, attempt, {ec, std::move(diagnostic)}, answer);
                  }
                });
}

void PeerDirectory::dial_answered(const std::string& peer_id, std::uint64_t attempt, Failure failure,
                                  const SideMessage& message) {
  InitAnswer answer;
  if (!failure) {
    answer = decode_side_message<InitAnswer>(message, failure.code);
    if (failure) {
      failure = {errc::handshake_failed, "answered the handshake with '" + message.type() + "': " + failure.code.message()};
    }
  }
  if (!failure && answer.status != InitAnswer::ok && answer.status != InitAnswer::yield) {
    failure = {errc::handshake_failed, "answered the handshake with status '" + answer.status + "'"};
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
    return;
  }
  std::error_code ignored;
  auto host = std::make_shared<Host>(weak_from_this(), notifications_, options_.regions,
                                     PeerDescription{peer_id, answer.incarnation, peer->url,
                                                     parse_url(peer->url, ignored).host, read_regions(answer.regions)});
  // Taken out: `connect` runs without the lock, and a superseding attempt must not destroy the dial meanwhile.
  const auto dial = std::move(peer->dial);
  lock.unlock();
  dial->connect(host, answer.endpoint, Clock::now() + options_.handshake_timeout,
                link_handler(peer_id, attempt, host));
}

void PeerDirectory::answer(const SideMessage& message, HandshakeService::Reply reply) {
  std::error_code ec;
  const auto question = decode_side_message<InitQuestion>(message, ec);
  Failure failure{ec, "malformed " + message.type()};
  if (!failure && (question.sender_id.empty() || question.receiver_id.empty())) {
    failure = {errc::empty_peer_id, "the handshake's sender or receiver id is empty"};
  }
  if (!failure) {
    failure = check_handshake({hooks_.name, incarnation_, options_.regions, options_.require_equal_page_sizes},
                              question.sender_id, question.version, question.transport, question.incarnation,
                              question.regions);
  }
  if (!failure && !question.init_url.empty()) {
    (void)parse_url(question.init_url, failure.code);
    failure.sentence = "init url '" + question.init_url + "' of the peer";
  }
  const auto refuse = [&](const Failure& cause) {
    reply(encode_side_message(SideMessageError{cause.code.value(), cause.sentence}));
  };
  if (failure) {
    refuse(failure);
    return;
  }

  InitAnswer answer;
  answer.status = InitAnswer::ok;
  answer.transport = hooks_.name;
  answer.incarnation = incarnation_;
  answer.regions = describe_regions(options_.regions);

  Lock lock(mutex_);
  const auto it = peers_.find(question.sender_id);
  if (closed_ || (it == peers_.end() && peers_.size() >= options_.max_peers)) {
    failure = closed_ ? Failure{errc::closed, "the channel is closed"}
                      : Failure{errc::resource_limit,
                                "this channel knows " + std::to_string(options_.max_peers) + " peers already"};
    lock.unlock();
    refuse(failure);
    return;
  }
  Peer& peer = peers_[question.sender_id];
  if (peer.state == Peer::State::dialing && !peer.yielded && incarnation_ < question.incarnation) {
    answer.status = InitAnswer::yield;
    lock.unlock();
    reply(encode_side_message(answer));
    return;
  }
  peer.id = question.sender_id;
  peer.local_id = question.receiver_id;
  if (!question.init_url.empty()) {
    peer.url = question.init_url;
  }
  std::shared_ptr<Link> stale;
  if (peer.link && peer.description->incarnation != question.incarnation) {
    stale = std::move(peer.link);
    peer.last_failure = {errc::peer_restarted, "the peer restarted"};
  }
  if (!peer.link) {
    peer.state = Peer::State::accepting;
  }
  const auto deadline = Clock::now() + options_.handshake_timeout;
  const std::uint64_t attempt = begin_attempt(peer, deadline);
  lock.unlock();
  if (stale) {
    stale->shut(errc::peer_restarted, "the peer restarted");
  }

  auto host = std::make_shared<Host>(
      weak_from_this(), notifications_, options_.regions,
      PeerDescription{question.sender_id, question.incarnation, question.init_url, {}, read_regions(question.regions)});
  try {
    answer.endpoint = hooks_.accept(host, question.endpoint, deadline, link_handler(question.sender_id, attempt, host));
  } catch (const std::system_error& error) {
    failure = {error.code(), error.what()};
    fail_attempt(question.sender_id, attempt, failure);
    refuse(failure);
    return;
  }
  reply(encode_side_message(answer));
}

LinkHandler PeerDirectory::link_handler(std::string peer_id, std::uint64_t attempt, std::shared_ptr<Host> host) {
  return [weak = weak_from_this(), peer_id = std::move(peer_id), attempt, host = std::move(host)](
             std::error_code ec, std::shared_ptr<Link> link, std::string diagnostic) {
    const auto self = weak.lock();
    if (self && !ec) {
      self->publish(peer_id, attempt, host, std::move(link));
    } else if (self) {
      self->fail_attempt(peer_id, attempt, {ec, std::move(diagnostic)});
    } else if (link) {
      link->shut(errc::closed, "the channel is closed");
    }
  };
}

PeerDirectory::Peer* PeerDirectory::current(const std::string& peer_id, std::uint64_t attempt) {
  const auto it = peers_.find(peer_id);
  return closed_ || it == peers_.end() || it->second.attempt != attempt ? nullptr : &it->second;
}

void PeerDirectory::fail_attempt(const std::string& peer_id, std::uint64_t attempt, Failure failure) {
  std::vector<WaitingFor> told;
  std::unique_ptr<Dial> dial;
  {
    Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    if (peer == nullptr || (peer->state != Peer::State::dialing && peer->state != Peer::State::accepting)) {
      return;
    }
    // A call that came later may have more time than the attempt had, and one that waited for the peer's own attempt
    // has had no attempt yet.
    const bool again = !peer->url.empty() && (peer->state == Peer::State::accepting || failure.code == errc::timed_out);
    const auto now = Clock::now();
    const auto rest = std::stable_partition(peer->waiting.begin(), peer->waiting.end(),
                                            [&](const WaitingFor& waiting) { return !again || waiting.deadline <= now; });
    told.assign(std::make_move_iterator(peer->waiting.begin()), std::make_move_iterator(rest));
    peer->waiting.erase(peer->waiting.begin(), rest);
    peer->state = Peer::State::unconnected;
    peer->last_failure = failure;
    ++peer->attempt;  // whatever of this attempt is still under way is dropped
    dial = std::move(peer->dial);
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
  std::vector<WaitingFor> told;
  std::shared_ptr<Link> replaced;
  {
    const Lock lock(mutex_);
    Peer* const peer = current(peer_id, attempt);
    if (peer == nullptr || host->failed()) {
      replaced = std::move(link);
    } else {
      replaced = std::exchange(peer->link, std::move(link));
      if (!peer->description) {
        peer->acknowledged_incarnation = host->peer().incarnation;
      }
      peer->description = host->description();
      peer->state = Peer::State::ready;
      told.swap(peer->waiting);
    }
  }
  if (replaced) {
    replaced->shut(errc::connection_lost, "the connection was replaced by a new one");
  }
  if (host->failed()) {
    fail_attempt(peer_id, attempt, {errc::connection_lost, "the connection broke as soon as it was made"});
  }
  for (const auto& waiting : told) {
    waiting.tell({});
  }
}

void PeerDirectory::link_failed(const std::string& peer_id, const Link& link, std::error_code cause) {
  std::shared_ptr<Link> dropped;
  const Lock lock(mutex_);
  const auto it = peers_.find(peer_id);
  if (it != peers_.end() && it->second.link.get() == &link) {
    Peer& peer = it->second;
    dropped = std::move(peer.link);
    peer.last_failure = {cause, "the connection to the peer was lost: " + cause.message()};
    // An attempt that began while the link was still there goes on.
    peer.state = peer.state == Peer::State::ready ? Peer::State::unconnected : peer.state;
  }
}

std::optional<PeerInfo> PeerDirectory::info(std::string_view peer_id) const {
  std::shared_ptr<Link> link;
  PeerInfo info;
  {
    const Lock lock(mutex_);
    const auto it = peers_.find(peer_id);
    if (it == peers_.end() || it->second.state != Peer::State::ready) {
      return std::nullopt;
    }
    const Peer& peer = it->second;
    link = peer.link;
    info = {peer.id, peer.description->incarnation, peer.url, peer.description->regions, {}};
  }
  info.path = link->path();
  return info;
}

void PeerDirectory::close() {
  std::map<std::string, Peer, std::less<>> peers;
  {
    const Lock lock(mutex_);
    closed_ = true;
    peers.swap(peers_);
  }
  for (const auto& [id, peer] : peers) {
    if (peer.link) {
      peer.link->shut(errc::closed, "the channel was closed");
    }
    for (const auto& waiting : peer.waiting) {
      waiting.tell({errc::closed, {}});
    }
  }
}

}  // namespace kvferry::kit
