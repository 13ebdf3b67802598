// SPDX-License-Identifier: Apache-2.0
#include "rail_protocol.hpp"

#include <algorithm>
#include <new>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/rdma_error.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/in_flight.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {
RailProtocol::RailProtocol(std::shared_ptr<kit::LinkHost> host, std::shared_ptr<LinkRegions> regions, std::size_t place,
                           MessageSlots slots, RailTerms terms, std::shared_ptr<const MemoryLook> look)
    : host_(std::move(host)),
      regions_(std::move(regions)),
      place_(place),
      slot_bytes_(slots.bytes),
      terms_(terms),
      look_(std::move(look)),
      credits_(terms_.peer_buffers_at_first),
      own_buffers_(terms_.own_buffers_at_first),
      told_regions_(host_->told_regions()),
      told_next_region_(told_regions_->next()),
      remote_(regions_->peers()) {
  add_slots(slots);
}

void RailProtocol::add_slots(const MessageSlots& more) {
  free_slots_.reserve(slots_.size() + more.count);
  slots_.reserve(slots_.size() + more.count);
  for (std::size_t i = 0; i < more.count; ++i) {
    free_slots_.push_back(slots_.size());
    slots_.push_back({more.memory + i * more.bytes, more.key});
  }
  wants_slots_ = false;
}

void RailProtocol::add_buffers(std::size_t more) noexcept {
  own_buffers_ += more;
  owed_ += more;
  wants_buffers_ = false;
}

void RailProtocol::stay_small() noexcept {
  may_grow_ = false;
  wants_slots_ = false;
  wants_buffers_ = false;
}

void RailProtocol::start(std::shared_ptr<kit::StripedOperation> batch, kit::ObjectRange range,
                         Preparation preparation) {
  const auto& operation = batch->operation();
  const TransferRequest& request = operation->request();
  auto refused = failed_ ? kit::Failure{failed_, failed_why_} : kit::refusal_of(*operation);
  if (!refused) {
    refused = look_up_regions(request, range);
  }
  if (refused) {
    if (preparation.offered) {
      preparation.offered->close();
    }
    (void)batch->part_done(refused.code, std::move(refused.sentence));
    return;
  }

  const std::uint64_t id = next_id_++;
  Transfer* made = nullptr;
  try {
    made = &transfers_[id];
    ids_.emplace(operation.get(), id);
  } catch (const std::bad_alloc&) {
    // From where it is known it ends with the others; up to there this is its only owner.
    transfers_.erase(id);
    if (preparation.offered) {
      preparation.offered->close();
    }
    (void)batch->part_done(std::make_error_code(std::errc::not_enough_memory), {});
    return;
  }
  Transfer& transfer = *made;
  transfer.id = id;
  transfer.batch = std::move(batch);
  transfer.range = range;
  transfer.landed_end = range.begin;
  transfer.own_memory = std::move(preparation.own_memory);
  transfer.borrowed = std::move(preparation.borrowed);
  transfer.offered = std::move(preparation.offered);
  if (auto failure = begin_checks(transfer, std::move(preparation.uncompared))) {
    end(transfer, failure.code, std::move(failure.sentence));
    return;
  }
  if (range.begin == range.end && request.one_sided()) {
    planned_all(transfer);  // what is left is the notification
    return;
  }
  switch (request.kind) {
    case TransferKind::write:
    case TransferKind::read: {
      transfer.remote = remote_;
      transfer.planner = WorkPlanner(kit::LocalBytes(transfer.objects(), request.local_strides), range,
                                     RemoteMemory::of(request, *remote_, place_));
      if (transfer.planner.done()) {
        planned_all(transfer);
        transfer.landed_end = range.end;
        go_on_checking(transfer);
        if (!transfer.checks.on) {
          transfer.operation().landed(range.begin, range.end - range.begin);
        }
        end_if_done(transfer);
      } else {
        moving_.push_back(id);
      }
      break;
    }
    case TransferKind::send:
      transfer.state = State::matching;
      matcher_.add_send(request.tag, id, id);
      match(request.tag);
      break;
    case TransferKind::recv:
      transfer.state = State::told;
      recv_posts_.push_back(id);
      break;
  }
}

void RailProtocol::stop(const kit::Operation& operation) {
  const auto it = ids_.find(&operation);
  if (it == ids_.end()) {
    return;
  }
  Transfer& transfer = transfers_.at(it->second);
  if (transfer.state == State::stopping) {
    return;
  }
  const auto cause = operation.stop_cause();
  if (transfer.acknowledged) {
    // All of it has arrived, and the peer has said so: what is left are its adapter's answers.
    end_when_drained(transfer, transfer.failure, std::move(transfer.why));
    return;
  }
  if (transfer.request().kind == TransferKind::send && transfer.remote_recv != 0) {
    if (!told_all(transfer)) {
      abort_send(transfer);
    } else if (transfer.checks.on) {
      // The peer, which answers in any case, may have much to compare before it would.
      tell_recv_aborted(transfer.remote_recv, errc::peer_cancelled, 0, transfer.sent_as);
    }
  }
  if (transfer.request().kind != TransferKind::recv) {
    end_when_drained(transfer, cause);
    return;
  }
  if (transfer.checks.complete) {
    refuse_complete(transfer);
    end(transfer, cause, {});
    return;
  }
  if (transfer.recv_posted) {
    MessageHeader cancel;
    cancel.type = MessageType::recv_cancel;
    cancel.operation = transfer.id;
    cancel.tag = transfer.request().tag;
    tell(cancel);
  }
  if (!transfer.recv_posted || !transfer.offered->any_direct()) {
    end(transfer, cause, {});
    return;
  }
  // The sender may be writing into the buffers: until it says that it won't any more, or is kept out.
  transfer.failure = cause;
  transfer.state = State::stopping;
  transfer.stopped = kit::Clock::now();
  ++draining_;
}

/// Of a recv that ends before it was compared: all of it has come, so the sender is done with it, and waits for this.
void RailProtocol::refuse_complete(const Transfer& recv) {
  MessageHeader ack;
  ack.type = MessageType::send_ack;
  ack.operation = recv.sent_as;
  ack.status = static_cast<std::uint32_t>(errc::peer_cancelled);
  tell(ack);
}

/// Goes out behind the writes into the recv's buffers that are under way. Objects in messages are put there by the peer, when
/// it gets to them: it has to say that it did.
void RailProtocol::abort_send(Transfer& send) {
  send.answer_awaited = told_some(send);
  tell_recv_aborted(send.remote_recv, errc::peer_cancelled, 0, send.answer_awaited ? send.sent_as : 0);
}

std::optional<kit::Clock::time_point> RailProtocol::draining_since() const {
  std::optional<kit::Clock::time_point> since;
  if (draining_ != 0) {
    for (const auto& [id, transfer] : transfers_) {
      if (transfer.state == State::stopping && (!since || transfer.stopped < *since)) {
        since = transfer.stopped;
      }
    }
  }
  return since;
}

bool RailProtocol::cut_off(kit::Clock::time_point until) {
  std::vector<std::uint64_t> closable;
  bool others = false;
  for (const auto& [id, transfer] : transfers_) {
    if (transfer.state == State::stopping && transfer.stopped <= until) {
      const bool is_recv = transfer.request().kind == TransferKind::recv;
      // Of a recv that is complete nothing is under way: what is left is to compare it.
      if (is_recv && (transfer.checks.complete || transfer.offered->revocable())) {
        closable.push_back(id);
      } else {
        others = true;
      }
    }
  }
  for (const std::uint64_t id : closable) {
    Transfer& transfer = transfers_.at(id);
    if (transfer.checks.complete) {
      refuse_complete(transfer);
    }
    end(transfer, transfer.failure, {});
  }
  return others;
}

void RailProtocol::fail(std::error_code cause, const std::string& why, std::uint64_t culprit) {
  if (!failed_) {  // else memory was used up in the middle of this
    failed_ = cause_for_others(cause, culprit);
    failed_why_ = kit::copied_if_memory_lasts(why);
  }
  control_.clear();
  matcher_.clear_posts();
  records_.clear();
  fences_.clear();
  probes_.clear();
  asked_.clear();
  checking_.clear();
  questions_ready_.clear();
  questions_asked_.clear();
  while (!transfers_.empty()) {
    Transfer& transfer = transfers_.begin()->second;
    const bool stopped = transfer.state == State::stopping;
    if (transfer.notification_done) {
      // The peer answered what came behind the batch: all of it has landed, though its adapter didn't get to say so.
      transfer.operation().landed(transfer.landed_end, transfer.range.end - transfer.landed_end);
      transfer.landed_end = transfer.range.end;
    }
    if (transfer.notification_done || transfer.acknowledged) {
      end(transfer, transfer.failure, std::move(transfer.why));
      continue;
    }
    std::error_code code = stopped ? transfer.failure : transfer.id == culprit ? cause : failed_;
    // Requests that the peer's adapter has refused aren't under way.
    const bool refused =
        transfer.id == culprit && cause.category() == rdma_category() && cause != condition::may_still_land;
    if (may_land(transfer) && !refused) {
      code = kit::in_flight(code);
    }
    transfer.outstanding = 0;
    transfer.answer_awaited = false;
    end(transfer, code, stopped ? std::move(transfer.why) : kit::copied_if_memory_lasts(why));
  }
  for (const auto& [id, done] : std::exchange(own_fences_, {})) {
    done();
  }
  fail_regions();
}

std::error_code RailProtocol::cause_for_others(std::error_code cause, std::uint64_t culprit) noexcept {
  return culprit == 0 || cause == condition::retryable ? cause : std::error_code(errc::connection_lost);
}

/// Whether the peer has been sent something of it that it answers by itself.
bool RailProtocol::told_all(const Transfer& transfer) noexcept {
  if (transfer.request().kind == TransferKind::send) {
    return transfer.state == State::told && transfer.remote_recv != 0 && !transfer.acknowledged;
  }
  const auto& notification = transfer.request().notification;
  return transfer.request().one_sided() && !notification.empty() &&
         transfer.said == notification.size() && !transfer.notification_done;
}

/// Whether the peer has been sent some of its notification: then it gets the rest, whatever becomes of the operation. A peer that
/// waits for a rest in vain gives up the connection.
bool RailProtocol::notification_begun(const Transfer& transfer) noexcept {
  return transfer.request().one_sided() && transfer.said != 0 && !transfer.notification_done;
}

/// Whether the peer has been sent objects of it in messages.
bool RailProtocol::told_some(const Transfer& send) noexcept { return send.next_object != 0 || send.next_offset != 0; }

/// Whether all of a one-sided one is where it belongs, its notification included.
bool RailProtocol::has_landed(const Transfer& transfer) noexcept {
  return transfer.request().one_sided() && transfer.planner.done() && transfer.outstanding == 0 && all_checked(transfer) &&
         (transfer.request().notification.empty() || transfer.notification_done);
}

/// Whether bytes of it, or its notification, may be under way to the peer.
bool RailProtocol::may_land(const Transfer& transfer) noexcept {
  const TransferKind kind = transfer.request().kind;
  if (kind == TransferKind::send) {
    return transfer.outstanding != 0 || transfer.answer_awaited || transfer.remote_recv != 0;
  }
  const bool told = transfer.answer_awaited || told_all(transfer);
  if (kind == TransferKind::read) {
    return told;
  }
  return kind == TransferKind::write && (transfer.outstanding != 0 || transfer.arrival_awaited || told);
}

void RailProtocol::end_if_done(Transfer& transfer) {
  if (transfer.outstanding != 0 || transfer.answer_awaited) {
    return;
  }
  const bool compared = !transfer.request().one_sided() || all_checked(transfer);
  if (compared && transfer.checks.on && transfer.request().one_sided()) {
    decide(transfer, transfer.range.end);
  }
  if (transfer.state == State::stopping) {
    const bool landed = has_landed(transfer) && !transfer.notification_done;  // else its answer says what to end with
    end(transfer, landed ? std::error_code() : transfer.failure, std::move(transfer.why));
    return;
  }
  const bool is_send = transfer.request().kind == TransferKind::send;
  const bool waits = is_send ? !transfer.acknowledged : transfer.notification_attached && !transfer.notification_done;
  if (transfer.state == State::told && !waits && !transfer.arrival_awaited && compared) {
    end(transfer, transfer.failure, std::move(transfer.why));
  }
}

void RailProtocol::end_when_drained(Transfer& transfer, std::error_code cause, std::string why) {
  transfer.answer_awaited = transfer.answer_awaited || told_all(transfer) || notification_begun(transfer);
  if (transfer.outstanding == 0 && !transfer.answer_awaited) {
    end(transfer, cause, std::move(why));
    return;
  }
  transfer.failure = cause;
  transfer.why = std::move(why);
  transfer.state = State::stopping;
  transfer.stopped = kit::Clock::now();
  ++draining_;
  if (!transfer.answer_awaited) {
    forget_meeting(transfer);
  }
}

void RailProtocol::end(Transfer& transfer, std::error_code cause, std::string why) {
  const auto batch = transfer.batch;
  if (transfer.offered) {
    transfer.offered->close();
  }
  transfer.borrowed.reset();  // before the caller hears of the end: it may have no more memory to lock
  if (transfer.parts_done) {
    forget(transfer);
    batch->operation()->finish(cause, std::move(why));
    return;
  }
  std::string failure;
  if (cause) {
    failure.swap(why);
  }
  if (!batch->part_done(cause, std::move(failure))) {
    forget(transfer);
    return;
  }
  const std::error_code stopped = batch->operation()->stop_cause();
  if (!batch->operation()->request().notification.empty() && !transfer.notification_attached && !stopped) {
    transfer.parts_done = true;
    transfer.state = State::notifying;
    notifications_.push_back(transfer.id);
    return;
  }
  const bool unsaid = !batch->operation()->request().notification.empty() && !transfer.notification_done;
  forget(transfer);
  batch->operation()->finish(unsaid ? stopped : std::error_code(), std::move(why));
}

void RailProtocol::forget(Transfer& transfer) {
  if (transfer.state == State::stopping) {
    --draining_;
  }
  forget_meeting(transfer);
  if (transfer.request().kind == TransferKind::write) {
    for (Fence& fence : fences_) {
      fence.writes -= transfer.id < fence.before ? 1 : 0;
    }
    answer_fences();
  }
  ids_.erase(&transfer.operation());
  // An id that is still in a queue is skipped there.
  transfers_.erase(transfer.id);
}

void RailProtocol::fence(std::function<void()>&& done) {
  if (failed_) {
    std::exchange(done, nullptr)();
    return;
  }
  MessageHeader header;
  header.type = MessageType::fence;
  header.operation = next_id_++;
  own_fences_[header.operation].swap(done);
  tell(header);
}

std::size_t RailProtocol::fences_asked() const noexcept {
  return static_cast<std::size_t>(std::ranges::count(fences_, 0U, &Fence::before));
}

void RailProtocol::begin_fences(std::size_t count) {
  const auto writes = static_cast<std::size_t>(std::ranges::count_if(
      transfers_, [](const auto& entry) { return entry.second.request().kind == TransferKind::write; }));
  for (Fence& fence : fences_) {
    if (fence.before == 0 && count != 0) {
      fence.before = next_id_;
      fence.writes = writes;
      --count;
    }
  }
  answer_fences();
}

void RailProtocol::answer_fences() {
  std::erase_if(fences_, [&](const Fence& fence) {
    if (fence.before == 0 || fence.writes != 0) {
      return false;
    }
    MessageHeader header;
    header.type = MessageType::fence_ack;
    header.operation = fence.id;
    tell(header);
    return true;
  });
}

}  // namespace kvferry::rdma
