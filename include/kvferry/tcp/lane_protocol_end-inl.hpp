// SPDX-License-Identifier: Apache-2.0
#pragma once

//
// How operations end, and when nothing of them is left: stopped, failed, fenced.
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/in_flight.hpp>

#include <kvferry/tcp/lane_protocol.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE void LaneProtocol::stop(const kit::Operation& operation) {
  const auto it = ids_.find(&operation);
  if (it == ids_.end()) {
    return;
  }
  Transfer& transfer = transfers_.at(it->second);
  if (transfer.stopping) {
    return;
  }
  switch (transfer.request().kind) {
    case TransferKind::send:
      if (transfer.remote_recv != 0) {
        tell_recv_aborted(transfer.remote_recv, errc::peer_cancelled);
      }
      break;
    case TransferKind::recv: {
      FrameHeader cancel;
      cancel.type = FrameType::recv_cancel;
      cancel.operation = transfer.id;
      cancel.tag = transfer.request().tag;
      tell(cancel);
      break;
    }
    case TransferKind::write:
    case TransferKind::read: break;
  }
  if (receiving_ == transfer.id) {
    reader_.abandon_payload();
  }
  take_back(transfer);
  if (!transfer.under_way()) {
    end(transfer, operation.stop_cause(), {});
    return;
  }
  // Frames are answered in the order in which they were sent: with the last answer, nothing of it is left to land.
  transfer.stopping = true;
  drains_.push_back({transfer.id, kit::Clock::now()});
}

KVFERRY_INLINE std::optional<kit::Clock::time_point> LaneProtocol::draining_since() {
  while (!drains_.empty() && !transfers_.contains(drains_.front().id)) {
    drains_.pop_front();
  }
  return drains_.empty() ? std::nullopt : std::optional(drains_.front().since);
}

/// Takes the frames out of which nothing has been sent.
KVFERRY_INLINE void LaneProtocol::take_back(Transfer& transfer) {
  const std::size_t dropped = transfer.pins == 0 ? 0 : out_.drop_unbegun(transfer.id);
  transfer.pins -= dropped;
  unacknowledged_ -= dropped;
  for (std::size_t i = 0; i < dropped; ++i) {
    transfer.outstanding.pop_back();
  }
  transfer.cut = transfer.cut || dropped != 0;
}

KVFERRY_INLINE void LaneProtocol::end(Transfer& transfer, std::error_code cause, std::string why) {
  ++completed_;
  const auto batch = transfer.batch;
  if (transfer.notifying) {
    forget(transfer);
    batch->operation()->finish(cause, std::move(why));
    return;
  }
  std::string failure;
  if (cause) {
    failure.swap(why);
  }
  if (batch->part_done(cause, std::move(failure))) {
    if (!batch->operation()->request().notification.empty() && !transfer.notification_attached) {
      if (const auto given_up = batch->operation()->stop_cause()) {
        forget(transfer);
        batch->operation()->finish(given_up, "all objects have landed, the notification was not sent");
        return;
      }
      transfer.notifying = true;
      ready_data_.push_back(transfer.id);
      return;
    }
    forget(transfer);
    batch->operation()->finish({}, std::move(why));
    return;
  }
  forget(transfer);
}

KVFERRY_INLINE void LaneProtocol::forget(const Transfer& transfer) {
  if (receiving_ == transfer.id) {
    receiving_ = 0;
  }
  const TransferRequest& request = transfer.request();
  if (request.kind == TransferKind::send) {
    if (transfer.remote_recv != 0) {
      sends_by_recv_.erase(transfer.remote_recv);
    } else {
      matcher_.remove_send(request.tag, transfer.order);
    }
  }
  if (const auto it = ids_.find(&transfer.operation()); it != ids_.end()) {
    (void)spare_ids_.take(ids_, it);
  }
  // An id that is still in a ready queue is skipped there.
  if (const auto it = transfers_.find(transfer.id); it != transfers_.end()) {
    spare_outstanding_ = std::move(it->second.outstanding);
    spare_outstanding_.clear();
    it->second = Transfer();
    spare_transfers_.drop(transfers_, it);
  }
  works_.store(!transfers_.empty(), std::memory_order_relaxed);
}

KVFERRY_INLINE bool LaneProtocol::in_flight() const noexcept {
  return failed_in_flight_ ||
         std::ranges::any_of(transfers_, [](const auto& entry) { return entry.second.under_way(); });
}

KVFERRY_INLINE void LaneProtocol::peer_gone() {
  peer_gone_ = true;
  if (receiving_ == 0) {
    frame_status_ = errc::connection_lost;
    reader_.abandon_payload();
  }
}

KVFERRY_INLINE void LaneProtocol::fence(std::function<void()> done) {
  if (failed_) {
    done();
    return;
  }
  const bool asked = !fences_.empty();
  (asked ? next_fences_ : fences_).push_back(std::move(done));
  if (!asked) {
    ask_fence();
  }
}

KVFERRY_INLINE void LaneProtocol::ask_fence() {
  FrameHeader header;
  header.type = FrameType::fence;
  tell(header);
}

KVFERRY_INLINE void LaneProtocol::answer_fence() {
  if (failed_) {
    return;
  }
  FrameHeader header;
  header.type = FrameType::fence_ack;
  tell(header);
}

KVFERRY_INLINE void LaneProtocol::fail(std::error_code cause, std::string why) {
  if (failed_) {
    return;
  }
  failed_ = cause;
  failed_why_ = std::move(why);
  for (auto& [id, transfer] : transfers_) {
    take_back(transfer);
  }
  out_.clear();
  control_.clear();
  probes_.clear();
  responses_.clear();
  unsent_answers_ = 0;
  queued_removals_ = 0;
  sent_removals_ = 0;
  matcher_.clear_posts();
  reader_.abandon_payload();
  while (!transfers_.empty()) {
    Transfer& transfer = transfers_.begin()->second;
    transfer.pins = 0;
    const std::error_code ended = transfer.stopping ? transfer.operation().stop_cause() : cause;
    failed_in_flight_ = failed_in_flight_ || transfer.under_way();
    end(transfer, transfer.under_way() ? kit::in_flight(ended) : ended, kit::copied_if_memory_lasts(failed_why_));
  }
  // Nothing is received from here on.
  for (auto* const fences : {&fences_, &next_fences_}) {
    for (const auto& done : std::exchange(*fences, {})) {
      done();
    }
  }
  while (!removed_.empty()) {
    const auto done = std::move(removed_.front().done);
    removed_.pop_front();
    if (done) {
      done();
    }
  }
}

}  // namespace kvferry::tcp
