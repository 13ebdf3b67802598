// SPDX-License-Identifier: Apache-2.0
#include "rail.hpp"

#include <asio/post.hpp>

#include <algorithm>
#include <array>
#include <exception>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/rdma_error.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

Rail::Rail(const asio::any_io_executor& executor, const RailPort& port, std::shared_ptr<RailDomain> domain,
           std::size_t number, const RailOptions& options, std::weak_ptr<Owner> owner)
    : executor_(executor),
      domain_(std::move(domain)),
      device_events_(port.events),
      options_(options),
      pair_(std::make_unique<QueuePair>(domain_, number, options.queue_pair)),
      endpoint_(pair_->endpoint()),
      events_(executor),
      timer_(executor),
      owner_(std::move(owner)) {}

Rail::~Rail() {
  // Only where the executor went before the channel is there anything left.
  if (events_.is_open()) {
    events_.release();
  }
  pair_.reset();
}

kit::Failure Rail::connect(std::shared_ptr<kit::LinkHost> host, const Joint& joint, Role role,
                           std::uint64_t own_incarnation) {
  kit::Failure failure;
  driver_.change([&] {
    if (failed_) {
      failure = {failure_, failure_why_};
      return;
    }
    failure = pair_->connect(joint.peer, joint.rail);
    if (failure) {
      return;
    }
    peers_endpoint_ = joint.rail;
    role_ = role;
    own_incarnation_ = own_incarnation;
    peers_incarnation_ = host->peer().incarnation;
    host_ = std::move(host);
    regions_ = joint.regions;
    protocol_.emplace(host_, joint.regions, joint.place, pair_->slots(), pair_->terms(), options_.look);
    std::error_code ec;
    events_.assign(pair_->event_descriptor(), ec);
    if (ec) {
      failure = {ec, "RDMA device '" + domain_->device().name() + "': its completions can't be awaited: " + ec.message()};
      return;
    }
    device_events_->add(weak_from_this(), pair_->pair(), pair_->completions());
    phase_ = Phase::greeting;
    last_activity_ = kit::Clock::now();
    if (role_ == Role::dialing &&
        protocol_->fill_message(list_, MessageType::hello, own_incarnation_, endpoint_.rail)) {
      post("hello");
    }
  });
  drive(callers_turn);
  return failure;
}

void Rail::run() {
  driver_.change([&] {
    if (failed_ || phase_ != Phase::greeted) {
      return;
    }
    phase_ = Phase::running;
    if (role_ == Role::accepting &&
        protocol_->fill_message(list_, MessageType::welcome, own_incarnation_, endpoint_.rail)) {
      post("welcome");
    }
    protocol_->region_added();  // since the handshake was made
  });
  drive(full_turn);
}

kit::Failure Rail::prepare(const kit::StripedOperation& batch, kit::ObjectRange range,
                           RailProtocol::Preparation& preparation) const {
  const TransferRequest& request = batch.operation()->request();
  const std::size_t eager = options_.queue_pair.eager_bytes;
  preparation.own_memory = domain_->regions([this] { return host_->local_regions(); });
  const SliceTable& regions = *preparation.own_memory;
  if (request.checksums.value_or(false)) {
    const Slice* hint = nullptr;
    for (std::size_t i = range.begin; i < range.end; ++i) {
      const MutableBuffer object = request.objects[i];
      const Slice* const slice = object.empty() ? nullptr : regions.find(address_of(object.data()), hint);
      if (slice != nullptr && slice->device_memory) {
        return {errc::not_supported,
                "object " + std::to_string(i) + " lies in a dma-buf's region, which no CPU takes checksums of"};
      }
    }
    if (batch.parts() == 1 && request.one_sided() && regions_) {
      preparation.uncompared = landing_on_others(request, regions_->addresses_of_peers());
    }  // else none does, or it would go over one rail
  }
  if (request.kind == TransferKind::recv) {
    preparation.offered = std::make_unique<OfferedBuffers>();
    return OfferedBuffers::offer(regions, domain_->handle(), request.objects, eager, *preparation.offered);
  }
  if (request.kind == TransferKind::send) {
    // The bytes that the protocol may write straight into the peer's buffers; the peer's messages may be smaller than this
    // side's.
    const std::size_t eager_here = protocol_ ? protocol_->eager_bytes() : eager;
    const Slice* hint = nullptr;
    bool any_large = false;
    for (std::size_t i = 0; i < request.objects.size(); ++i) {
      const MutableBuffer object = request.objects[i];
      const Slice* const slice = object.empty() ? nullptr : regions.find(address_of(object.data()), hint);
      if (slice != nullptr && slice->device_memory) {
        return {errc::not_supported,
                "object " + std::to_string(i) + " lies in a dma-buf's region, which is for writes and reads"};
      }
      any_large = any_large || object.size() > eager_here;
    }
    if (!any_large) {
      return {};
    }
  }
  kit::Failure failure;
  preparation.borrowed = BorrowedMemory::borrow(*domain_, regions, kit::LocalBytes(request), range,
                                                request.kind == TransferKind::read, failure);
  return failure;
}

void Rail::start(std::shared_ptr<kit::StripedOperation> batch, kit::ObjectRange range, Led* led) {
  RailProtocol::Preparation preparation;
  if (auto failure = prepare(*batch, range, preparation)) {
    (void)batch->part_done(failure.code, std::move(failure.sentence));
    return;
  }
  if (led != nullptr) {  // not before memory was registered, which takes its time
    *led = begin_leading();
  }
  driver_.put([&](Inbox& inbox) { inbox.starts.push_back({std::move(batch), range, std::move(preparation)}); });
  drive(callers_turn);
}

void Rail::stop(std::shared_ptr<kit::Operation> operation) {
  driver_.put([&](Inbox& inbox) { inbox.stops.push_back(std::move(operation)); });
  drive(callers_turn);
}

void Rail::fence(std::function<void()> done) {
  driver_.put([&](Inbox& inbox) { inbox.fences.push_back(std::move(done)); });
  drive(callers_turn);
}

void Rail::region_added() {
  driver_.put([](Inbox& inbox) { inbox.region_added = true; });
  drive(callers_turn);
}

void Rail::region_removed(std::uint32_t number, std::function<void()> done) {
  driver_.put([&](Inbox& inbox) { inbox.removed_regions.emplace_back(number, std::move(done)); });
  drive(callers_turn);
}

void Rail::ask_regions(std::function<void()> done) {
  driver_.put([&](Inbox& inbox) { inbox.region_questions.push_back(std::move(done)); });
  drive(callers_turn);
}

void Rail::probe(std::function<void()> answered) {
  driver_.put([&](Inbox& inbox) { inbox.probes.push_back(std::move(answered)); });
  drive(callers_turn);
}

void Rail::device_failed(std::error_code cause, const std::string& why) {
  driver_.put([&](Inbox& inbox) { inbox.trouble = {cause, why}; });
  drive(full_turn);
}

/// To be driven afterwards.
std::shared_ptr<const ibv_comp_channel> Rail::begin_leading() {
  std::shared_ptr<const ibv_comp_channel> channel;
  driver_.change([&] {
    if (!failed_ && !held_ && phase_ == Phase::running) {
      channel = pair_->event_channel();
      leader_ = std::this_thread::get_id();
      leader_sleeps_ = false;
    }
  });
  return channel;
}

Rail::Found Rail::lead(bool may_sleep) {
  auto found = Found::busy;
  Turn turn = full_turn;
  turn.checks = false;  // those are for the reactor
  turn.may_sleep = may_sleep;
  drive(turn, &found);
  return found;
}

void Rail::woken() {
  driver_.put([](Inbox& inbox) { inbox.woken = true; });
}

void Rail::end_leading() {
  driver_.change([&] {
    leader_ = {};
    leader_sleeps_ = false;
  });
  drive(callers_turn);
}

void Rail::drive_on_io_thread() {
  options_.io_rank->note_this_thread();
  drive(full_turn);
}

/// @param found set for the leader, unless another thread drives.
void Rail::drive(Turn turn, Found* found) {
  struct Driven {
    bool to_be_continued;
    std::shared_ptr<Owner> told_owner;
    std::shared_ptr<Owner> greeted_owner;
  };
  driver_.drive(
      [&](std::optional<Inbox> given) {
        Inbox taken = std::move(given).value_or(Inbox());
        bool more = false;
        const std::uint64_t moves_before = moves_;
        if (found != nullptr) {
          leader_sleeps_ = false;
        }
        try {
          apply(taken);
          more = work(turn, taken);
        } catch (const std::exception& error) {
          give_up(taken, error.what());  // memory is used up
        }
        // The leader goes on by itself, but for what is the reactor's.
        more = more && (!leads() || (!failed_ && protocol_->checks_wait()));
        if (found != nullptr) {
          *found = failed_ || held_                                       ? Found::released
                   : moves_ != moves_before || *found == Found::something ? Found::something
                                                                          : Found::nothing;
          // Where nothing was found, an event has been asked for, or the reactor goes on.
          leader_sleeps_ = turn.may_sleep && *found == Found::nothing;
        }
        return Driven{more && !std::exchange(continuation_posted_, true), std::exchange(told_owner_, nullptr),
                      std::exchange(greeted_owner_, nullptr)};
      },
      [&](const Driven& driven) {
        if (driven.greeted_owner) {
          driven.greeted_owner->rail_greeted();
        }
        if (driven.told_owner) {
          driven.told_owner->rail_broken(failure_, failure_why_);
        }
        if (!driven.to_be_continued) {
          return true;
        }
        try {
          asio::post(executor_, [self = shared_from_this()] {
            self->driver_.put([](Inbox& inbox) { inbox.continuation = true; });
            self->drive_on_io_thread();
          });
          return false;
        } catch (const std::exception&) {
          // There is no memory to have another thread go on: this one does.
          driver_.put([](Inbox& inbox) { inbox.continuation = true; });
          turn.rounds = full_turn.rounds;
          turn.checks = true;
          return true;
        }
      });
}

bool Rail::work(Turn& turn, Inbox& taken) {
  for (;;) {
    taken = driver_.take().value_or(Inbox());
    apply(taken);
    if (failed_ || held_ || (phase_ != Phase::greeting && phase_ != Phase::running)) {
      return false;
    }
    if (turn.rounds == 0) {
      arm_timer();
      return true;
    }
    --turn.rounds;
    const bool polled = poll_step() != 0;
    moves_ += polled ? 1U : 0U;
    await_writes();
    const bool posted = !failed_ && phase_ == Phase::running && post_step();
    const bool probed = !failed_ && phase_ == Phase::running && probe_step();
    const bool grown = !failed_ && phase_ == Phase::running && grow_step();
    moves_ += posted || probed ? 1U : 0U;
    // However much else there is, at the end of a turn there are some checksums.
    if ((polled || posted || probed || grown) && (!turn.checks || turn.rounds != 0)) {
      continue;
    }
    if (failed_) {
      return false;
    }
    if (phase_ == Phase::running && protocol_->checks_wait()) {
      if (!std::exchange(turn.checks, false)) {
        arm_timer();
        return true;
      }
      (void)protocol_->check_step();
      turn.rounds = callers_turn.rounds;  // to say what has come of it
      continue;
    }
    if (polled || posted || probed || grown) {
      continue;
    }
    if (leader_ != std::thread::id() && !leader_sleeps_ && !turn.may_sleep) {
      arm_timer();
      return false;  // the leader looks again
    }
    if (!turn.may_sleep && spins()) {
      arm_timer();
      return true;
    }
    if (armed_) {
      break;
    }
    if (const auto error = pair_->arm()) {
      fail(error, "RDMA device '" + domain_->device().name() + "': no completion events: " + error.message());
      return false;
    }
    armed_ = true;  // what completed before has no event: once more
  }
  arm_timer();
  if (leader_ == std::thread::id()) {  // else the leader sleeps on it
    wait_for_event();
  }
  return false;
}

bool Rail::spins() const {
  return options_.spin.count() > 0 && !protocol_->idle() && kit::Clock::now() - last_activity_ < options_.spin;
}

/// @return how many completions there were.
std::size_t Rail::poll_step() {
  std::array<ibv_wc, poll_batch> completions;
  // While greeting one at a time: what comes behind the peer's greeting is for later.
  const int count = pair_->poll(std::span(completions).first(phase_ == Phase::greeting ? 1 : poll_batch));
  if (count < 0) {
    fail(errc::connection_lost, "RDMA device '" + domain_->device().name() + "': the completion queue can't be polled");
    return 0;
  }
  if (count == 0) {
    return 0;
  }
  last_activity_ = kit::Clock::now();
  const auto taken = std::span(completions).first(static_cast<std::size_t>(count));
  for (const ibv_wc& completion : taken) {
    take_completion(completion);
    if (failed_) {
      return taken.size();
    }
  }
  if (const auto error = pair_->post_receives(taken)) {
    fail(error, "RDMA device '" + domain_->device().name() + "': receive buffers can't be posted: " + error.message());
  }
  return taken.size();
}

/// Takes what has completed by now: no more than the queue holds, however fast the peer makes it grow.
void Rail::catch_up() {
  std::size_t left = pair_ == nullptr ? 0 : pair_->most_completions();
  while (!failed_ && !held_ && phase_ == Phase::running && left != 0) {
    const std::size_t taken = poll_step();
    left = taken < poll_batch ? 0 : left - std::min(left, taken);  // fewer than it asks for are all
  }
}

void Rail::take_completion(const ibv_wc& completion) {
  if (completion.status != IBV_WC_SUCCESS) {
    const bool flushed = completion.status == IBV_WC_WR_FLUSH_ERR;
    const auto cause =
        flushed ? std::error_code(errc::connection_lost) : std::error_code(static_cast<wc_status>(completion.status));
    const std::string why = flushed ? "the queue pair is in its error state"
                                    : ibv_wc_status_str(static_cast<ibv_wc_status>(completion.status));
    fail(cause, path() + ": " + why, QueuePair::is_receive(completion) ? 0 : completion.wr_id);
    return;
  }
  if (!QueuePair::is_receive(completion)) {
    protocol_->completed();
    if (protocol_->work_waits()) {
      domain_->device().window.note(protocol_->window_used());
    }
    return;
  }
  if (!QueuePair::is_message(completion)) {
    fail(errc::protocol_violation, path() + ": the peer wrote with immediate data");
    return;
  }
  if (phase_ == Phase::greeting) {
    take_greeting(completion);
    return;
  }
  if (const auto error = protocol_->received(pair_->message(completion))) {
    fail(error,
         path() + ": " +
             (error == errc::peer_closed ? std::string("the peer closed the connection") : protocol_->violation()));
  }
}

void Rail::take_greeting(const ibv_wc& completion) {
  const auto expected = role_ == Role::dialing ? MessageType::welcome : MessageType::hello;
  if (!protocol_->greeted(pair_->message(completion), expected, peers_incarnation_, endpoint_.rail)) {
    fail(errc::authentication_failed, path() + ": the peer's first message was no greeting");
    return;
  }
  phase_ = Phase::greeted;
  greeted_owner_ = owner_.lock();
}

/// In its turn behind what the queue pair has: that the adapter answers is all that is asked.
bool Rail::probe_step() {
  if (probes_.empty() || !protocol_->fill_probe(list_, probes_.back())) {
    return false;
  }
  probes_.pop_back();
  post("probe");
  return true;
}

/// Makes more memory for messages, if either side waits for want of it. @return whether there is more.
bool Rail::grow_step() {
  if (!protocol_->wants_slots() && !protocol_->wants_buffers()) {
    return false;
  }
  bool grown = false;
  std::error_code failure;
  try {
    if (protocol_->wants_slots()) {
      protocol_->add_slots(pair_->double_slots(most_slots));
      grown = true;
    }
    if (protocol_->wants_buffers()) {
      const std::size_t buffers = pair_->double_buffers(messages, failure);
      protocol_->add_buffers(failure ? 0 : buffers - protocol_->buffer_count());
    }
  } catch (const std::exception&) {
    protocol_->stay_small();  // there is no memory: messages wait for what there is
    return grown;             // with slots that were added before, some need not wait
  }
  if (failure) {
    fail(failure,
         "RDMA device '" + domain_->device().name() + "': receive buffers can't be posted: " + failure.message());
  }
  return true;
}

bool Rail::post_step() {
  if (!protocol_->fill(list_)) {
    return false;
  }
  post("work requests");
  return true;
}

void Rail::post(const char* what) {
  std::uint64_t culprit = 0;
  if (const auto error = pair_->post(list_, &culprit)) {
    // A part of the list may be with the adapter: only without its queue pair are buffers quiet. For a message no operation
    // is to blame; while the rail is being joined there is none, and whoever connects learns the cause.
    fail(culprit == 0 && phase_ == Phase::running ? std::error_code(errc::connection_lost) : error,
         path() + ": " + what + " can't be posted: " + error.message(), culprit);
  }
}

void Rail::wait_for_event() {
  if (waiting_) {
    return;
  }
  waiting_ = true;
  events_.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](std::error_code ec) {
    if (ec != asio::error::operation_aborted) {
      self->driver_.put([](Inbox& inbox) { inbox.event = true; });
      self->drive_on_io_thread();
    }
  });
}

std::string Rail::path() const {
  return domain_->device().name() + ":" + std::to_string(domain_->device().port()) + " queue pair " +
         std::to_string(endpoint_.queue_pair) + " -> " + std::to_string(peers_endpoint_.queue_pair);
}

}  // namespace kvferry::rdma
