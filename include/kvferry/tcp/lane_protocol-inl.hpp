// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/lane_protocol.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/checks.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE void LaneProtocol::start(std::shared_ptr<StripedOperation> batch, ObjectRange range) {
  use();
  const auto& operation = batch->operation();
  const TransferRequest& request = operation->request();
  auto refused = failed_ ? kit::Failure{failed_, failed_why_} : kit::refusal_of(*operation);
  if (refused) {
    (void)batch->part_done(refused.code, std::move(refused.sentence));
    return;
  }

  const std::uint64_t id = next_id_++;
  spare_ids_.add(ids_, operation.get())->second = id;
  works_.store(true, std::memory_order_relaxed);
  Transfer& transfer = spare_transfers_.add(transfers_, id)->second;
  transfer.outstanding = std::exchange(spare_outstanding_, {});
  transfer.id = id;
  transfer.order = id;
  transfer.batch = std::move(batch);
  transfer.range = range;
  transfer.cursor = ChunkCursor(request, range);
  transfer.checked = request.checksums.value_or(false);
  transfer.started = kit::Clock::now();
  transfer.sent_before = sent_;
  if (transfer.cursor.done() && request.one_sided()) {
    end(transfer, {}, {});  // what is left is the notification
    return;
  }
  switch (request.kind) {
    case TransferKind::write: ready_data_.push_back(id); break;
    case TransferKind::read:
      transfer.way = transfer.checked ? std::nullopt : way_to_read(request);
      (transfer.way ? ready_copies_ : ready_reads_).push_back(id);
      break;
    case TransferKind::send:
      matcher_.add_send(request.tag, id, id);
      match(request.tag);
      break;
    case TransferKind::recv: {
      ControlFrame post;
      post.header.type = FrameType::recv_post;
      post.header.operation = id;
      post.header.tag = request.tag;
      post.header.flags = transfer.checked ? FrameHeader::with_checksums : std::uint8_t{0};
      post.header.count = static_cast<std::uint32_t>(request.objects.size());
      post.descriptors.reserve(request.objects.size());
      for (const MutableBuffer object : request.objects) {
        post.descriptors.push_back({post.descriptors.size(), object.size()});
      }
      control_.push_back(std::move(post));
      break;
    }
  }
}

KVFERRY_INLINE bool LaneProtocol::looks_dead(const kit::Operation& operation,
                                             kit::Clock::duration least_silence, bool held_back) const {
  const auto it = ids_.find(&operation);
  if (it == ids_.end() || operation.stop_cause() != errc::timed_out) {
    return false;
  }
  const Transfer& transfer = transfers_.at(it->second);
  if (transfer.way && transfer.outstanding.empty()) {
    return false;  // this side alone makes it, and asks nothing
  }
  const bool silent = last_received_ < transfer.started && kit::Clock::now() - transfer.started >= least_silence;
  // It may have had no turn, because those before it can't get out.
  const bool stuck =
      sent_ == transfer.sent_before && (held_back || !out_.empty() || unacknowledged_ != 0 || outstanding_reads_ != 0);
  return silent && (!transfer.outstanding.empty() || stuck);
}

KVFERRY_INLINE void LaneProtocol::probe(std::function<void()> answered) {
  // A peer that owes that many answers is silent; one more question wouldn't change it.
  if (failed_ || probes_.size() >= max_outstanding_probes) {
    return;
  }
  probes_.push_back(std::move(answered));
  FrameHeader header;
  header.type = FrameType::probe;
  header.operation = ++last_probe_;
  tell(header);
}

KVFERRY_INLINE void LaneProtocol::match(std::uint64_t tag) {
  while (const auto match = matcher_.match(tag)) {
    meet(transfers_.at(match->send), match->recv, match->post);
  }
}

KVFERRY_INLINE void LaneProtocol::meet(Transfer& send, std::uint64_t recv, const Post& post) {
  const auto& objects = send.request().objects;
  send.remote_recv = recv;
  if (objects.size() != post.size()) {
    tell_recv_aborted(recv, errc::count_mismatch, objects.size());
    end(send, errc::count_mismatch,
        "tag " + std::to_string(send.request().tag) + ": the send has " + std::to_string(objects.size()) +
            " objects, the peer's recv " + std::to_string(post.size()));
    return;
  }
  send.checked = send.checked || post.checked;
  std::vector<bool> refused;
  for (std::size_t i = 0; i < objects.size(); ++i) {
    if (objects[i].size() > post.sizes[i]) {
      refused.resize(objects.size());
      refused[i] = true;
      send.operation().failed(i, errc::buffer_too_small);
      if (send.why.empty()) {
        send.why = "object " + std::to_string(i) + " has " + std::to_string(objects[i].size()) +
                   " bytes, the peer's buffer " + std::to_string(post.sizes[i]);
      }
    }
  }
  send.cursor.refuse(std::move(refused));
  sends_by_recv_.emplace(recv, send.id);
  ready_data_.push_back(send.id);
}

/// The recv that a send met was cancelled or timed out, perhaps before the two met: the send goes to the next one.
KVFERRY_INLINE void LaneProtocol::lose_recv(Transfer& send) {
  take_back(send);
  // Where nothing can be sent, nobody else takes it out, and recvs may come and go for ever.
  ready_data_.erase_if([&](std::uint64_t id) { return id == send.id; });
  sends_by_recv_.erase(send.remote_recv);
  send.remote_recv = 0;
  send.meets_again = true;
  if (send.pins == 0) {
    wait_for_recv(send);
  }
}

KVFERRY_INLINE void LaneProtocol::wait_for_recv(Transfer& send) {
  // Under a new id: what the peer says of the old one is not about what is sent now.
  auto node = transfers_.extract(send.id);
  const std::uint64_t id = next_id_++;
  node.key() = id;
  Transfer& again = transfers_.insert(std::move(node)).position->second;
  again.id = id;
  again.meets_again = false;
  again.outstanding.clear();
  again.cut = false;
  again.failure.clear();
  again.why.clear();
  again.failed_object = ~std::uint64_t{0};
  again.cursor = ChunkCursor(again.request(), again.range);
  again.checked = again.request().checksums.value_or(false);
  again.operation().start_over();
  ids_[&again.operation()] = id;
  const std::uint64_t tag = again.request().tag;
  matcher_.add_send(tag, again.order, id);
  match(tag);
}

KVFERRY_INLINE void LaneProtocol::tell_recv_aborted(std::uint64_t recv, std::error_code cause, std::size_t count) {
  FrameHeader header;
  header.type = FrameType::send_abort;
  header.operation = recv;
  header.status = static_cast<std::uint32_t>(cause.value());
  header.first_offset = count;
  tell(header);
}

KVFERRY_INLINE void LaneProtocol::settle(Transfer& transfer, const Chunk& chunk, std::error_code status,
                                         const ObjectSet* which) {
  kit::Operation& operation = transfer.operation();
  if (!status && transfer.cursor.none_refused() && transfer.failed_object == ~std::uint64_t{0}) {
    const std::size_t last = chunk.first + chunk.count - 1;
    operation.landed(chunk.first, chunk.last_end == transfer.cursor.local().size(last) ? chunk.count : chunk.count - 1);
    return;
  }
  ObjectRange run{chunk.first, chunk.first};
  const auto end_run = [&](std::size_t next) {
    if (run.begin != run.end) {
      operation.landed(run.begin, run.end - run.begin);
    }
    run = {next, next};
  };
  std::size_t first_failed = chunk.first + chunk.count;
  std::size_t number = 0;
  transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
    if (const std::size_t in_frame = number++; status && (which == nullptr || which->has(in_frame))) {
      first_failed = std::min(first_failed, piece.object);
      operation.failed(piece.object, status);
      transfer.failed_object = piece.object;
    } else if (piece.completes && !piece.refused && piece.object != transfer.failed_object) {
      ++run.end;
      return;
    }
    end_run(piece.object + 1);
  });
  end_run(0);
  if (status && !transfer.failure) {
    transfer.failure = status;
    transfer.why = which == nullptr ? "the peer refused objects from number " + std::to_string(chunk.first) +
                                          " on: " + status.message()
                                    : "object " + std::to_string(first_failed) +
                                          " landed with other bytes than were sent: its checksum differs";
  }
}

}  // namespace kvferry::tcp
