// SPDX-License-Identifier: Apache-2.0
#pragma once

// Handles received frames, by type.
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol_receive-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE std::error_code LaneProtocol::end_write(Frame& frame) {
  FrameHeader header;
  header.type = FrameType::write_ack;
  header.operation = frame.header.operation;
  std::vector<Descriptor> differing;
  if (frame.header.type == FrameType::write && frame_status_) {
    header.status = wire_status(frame_status_);
  } else if (frame.header.type == FrameType::write) {
    header.status = wire_status(landed(frame));
    differing = differing_objects(frame);
  } else if (peer_gone_) {
    header.status = wire_status(errc::connection_lost);
  }
  if (header.status == 0 && !frame.notification.empty()) {
    ++completed_;
    if (!host_->deliver_notification(std::move(frame.notification), frame.header.tag)) {
      header.flags = FrameHeader::notification_refused;
    }
  }
  return acknowledge(header, std::move(differing));
}

KVFERRY_INLINE std::error_code LaneProtocol::acknowledge(FrameHeader header, std::vector<Descriptor> which) {
  // A peer that keeps to its window can't be owed more.
  if (++queued_acknowledgements_ > max_unacknowledged) {
    return violated("more than " + text(max_unacknowledged) + " frames unacknowledged");
  }
  header.count = static_cast<std::uint32_t>(which.size());
  control_.push_back({header, std::move(which)});
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_acknowledgement(const Frame& frame) {
  const FrameHeader& header = frame.header;
  if (unacknowledged_ == 0) {
    return violated("acknowledgement of nothing");
  }
  --unacknowledged_;
  std::error_code ec;
  Transfer* const transfer = header.type == FrameType::write_ack ? find_acknowledged(header.operation, ec)
                                                                 : find(header.operation, TransferKind::send, ec);
  if (transfer == nullptr) {
    return ec;
  }
  auto status = status_code(header.status);
  const bool notification_refused = (header.flags & FrameHeader::notification_refused) != 0;
  if (notification_refused && !transfer->failure) {
    transfer->failure = errc::resource_limit;
    transfer->why = "the peer's queue of notifications is full; the data has landed";
  }
  if (transfer->notifying) {
    if (!transfer->notification_sent) {
      return violated("acknowledgement of operation " + text(header.operation) + "'s notification before it was sent");
    }
    end(*transfer, status ? status : transfer->failure, std::move(transfer->why));
    return {};
  }
  if (transfer->outstanding.empty() || transfer->pins >= transfer->outstanding.size()) {
    return violated("acknowledgement of operation " + text(header.operation) + " before its bytes were sent");
  }
  const Chunk chunk = transfer->outstanding.front();
  transfer->outstanding.pop_front();
  const std::size_t named = status == errc::checksum_mismatch ? ObjectSet::descriptors_for(chunk.count) : 0;
  if (frame.descriptors.size() != named) {
    return violated("acknowledgement with status " + text(header.status) + " and " + text(frame.descriptors.size()) +
                    " descriptors");
  }
  // Where this side has given the send up, the peer's having let go of its recv is no cause of its own; but nobody has
  // received it.
  const bool dropped = transfer->stopping && status == errc::peer_cancelled;
  if (!dropped) {
    if (named == 0) {
      settle(*transfer, chunk, status);
    } else {
      const ObjectSet which(frame.descriptors);
      if (!which.has_any_below(chunk.count)) {
        return violated("acknowledgement of a checksum that differs, without the object whose it is");
      }
      settle(*transfer, chunk, status, &which);
    }
  }
  if (transfer->whole() && !dropped) {
    end(*transfer, transfer->failure, std::move(transfer->why));
  } else if (transfer->stopping && !transfer->under_way()) {
    end(*transfer, transfer->operation().stop_cause(), {});
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_read(const Frame& frame) {
  if (responses_.size() - queued_removals_ + unsent_answers_ >= max_outstanding_reads) {
    return violated("more than " + text(max_outstanding_reads) + " reads unanswered");
  }
  Response response;
  response.pieces = std::exchange(spare_pieces_, {});
  std::error_code status;
  if (const auto ec =
          region_pieces(frame.header, frame.descriptors, regions(), Access::read, response.pieces, status)) {
    return ec;
  }
  response.header.type = FrameType::read_data;
  response.header.operation = frame.header.operation;
  response.header.status = wire_status(status);
  response.header.payload_bytes = status ? 0 : frame.header.payload_bytes;
  if ((frame.header.flags & FrameHeader::with_checksums) != 0 && !response.pieces.empty()) {
    response.checksums = lengths_of(frame);
    response.header.checksums = static_cast<std::uint16_t>(response.checksums.size());
  }
  responses_.push_back(std::move(response));
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::begin_read_data(const Frame& frame, std::vector<iovec>& scatter) {
  std::error_code ec;
  Transfer* const transfer = find(frame.header.operation, TransferKind::read, ec);
  if (transfer == nullptr) {
    return ec;
  }
  if (transfer->outstanding.empty()) {
    return violated("data for operation " + text(frame.header.operation) + ", which asked for none");
  }
  const Chunk& chunk = transfer->outstanding.front();
  const std::size_t expected = frame.header.status == 0 ? chunk.bytes : 0;
  if (frame.header.payload_bytes != expected) {
    return violated("answer to a read of " + text(expected) + " bytes with " + text(frame.header.payload_bytes));
  }
  if (transfer->checked && expected != 0 && frame.header.checksums == 0) {
    return violated("answer to a read with checksums that has none");
  }
  if (expected != 0) {
    local_pieces(*transfer, chunk, scatter);
    receiving_ = transfer->id;
  }
  return {};
}

KVFERRY_INLINE void LaneProtocol::local_pieces(const Transfer& transfer, const Chunk& chunk,
                                               std::vector<iovec>& pieces) {
  const kit::LocalBytes& local = transfer.cursor.local();
  transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
    if (piece.length != 0) {
      local.for_each_piece(piece.object, piece.offset, piece.length, [&](std::byte* data, std::size_t length) {
        pieces.push_back({data, length});
      });
    }
  });
}

KVFERRY_INLINE std::error_code LaneProtocol::end_read_data(const Frame& frame) {
  const FrameHeader& header = frame.header;
  if (outstanding_reads_ == 0) {
    return violated("data that nobody asked for");
  }
  --outstanding_reads_;
  std::error_code ec;
  Transfer* const transfer = find(header.operation, TransferKind::read, ec);
  if (transfer == nullptr) {
    return ec;
  }
  const Chunk chunk = transfer->outstanding.front();
  transfer->outstanding.pop_front();
  if (frame.unwritable && !transfer->failure) {
    transfer->failure = errc::memory_fault;
    transfer->why = "the memory of its objects can't be written";
  }
  if (header.status != 0) {
    settle(*transfer, chunk, status_code(header.status));
  } else if (const auto status = landed(frame); !differing_.empty()) {
    const ObjectSet which = differing_objects(frame, *transfer, chunk);
    settle(*transfer, chunk, status, &which);
  } else {
    settle(*transfer, chunk, status);
  }
  if (transfer->cursor.done() && transfer->outstanding.empty()) {
    end(*transfer, transfer->failure, std::move(transfer->why));
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_recv_post(Frame& frame) {
  const std::uint64_t recv = frame.header.operation;
  if (recv <= last_posted_) {
    return violated("recv " + text(recv) + " posted after recv " + text(last_posted_));
  }
  last_posted_ = recv;
  Post post;
  post.sizes.reserve(frame.descriptors.size());
  for (const Descriptor& descriptor : frame.descriptors) {
    post.sizes.push_back(descriptor.length);
  }
  post.checked = (frame.header.flags & FrameHeader::with_checksums) != 0;
  const bool overfull = frame.overfull;
  frame_memory_.clear();
  if (overfull || !matcher_.add_post(frame.header.tag, recv, std::move(post))) {
    if (++queued_refusals_ > max_unacknowledged) {
      return violated("recvs posted far beyond the limit");
    }
    tell_recv_aborted(recv, errc::resource_limit);
    return {};
  }
  match(frame.header.tag);
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_recv_cancel(const FrameHeader& header) {
  if (matcher_.remove_post(header.tag, header.operation)) {
    return {};
  }
  if (const auto met = sends_by_recv_.find(header.operation); met != sends_by_recv_.end()) {
    Transfer& send = transfers_.at(met->second);
    if (!send.stopping) {
      lose_recv(send);
    }
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::begin_send_data(const Frame& frame, std::vector<iovec>& scatter) {
  std::error_code ec;
  Transfer* const transfer = find(frame.header.operation, TransferKind::recv, ec);
  frame_status_ = transfer == nullptr ? std::error_code(errc::peer_cancelled) : std::error_code();
  if (transfer == nullptr) {
    return ec;
  }
  const auto& objects = transfer->request().objects;
  std::size_t object = transfer->next_object;
  std::size_t offset = transfer->next_offset;
  std::uint64_t total = 0;
  for (const Descriptor& descriptor : frame.descriptors) {
    const bool refused = (descriptor.index & Descriptor::refused) != 0;
    const bool continues = (descriptor.index & Descriptor::continues) != 0;
    if (continues && &descriptor != &frame.descriptors.back()) {
      return violated("an object that goes on in the next frame is followed by another one");
    }
    const std::uint64_t index = descriptor.index & ~(Descriptor::refused | Descriptor::continues);
    if (object >= objects.size() || index != object) {
      return violated("object " + text(index) + " sent, object " + text(object) + " of " + text(objects.size()) +
                      " is next");
    }
    if (refused ? continues || offset != 0 : descriptor.length > objects[object].size() - offset) {
      return violated("object " + text(index) + " sent with " + text(descriptor.length) + " bytes at offset " +
                      text(offset) + " for a buffer of " + text(objects[object].size()));
    }
    if (!refused && descriptor.length != 0) {
      scatter.push_back({objects[object].data() + offset, descriptor.length});
      total += descriptor.length;
    }
    if (continues) {
      offset += descriptor.length;
    } else {
      ++object;
      offset = 0;
    }
  }
  const bool last = (frame.header.flags & FrameHeader::last_chunk) != 0;
  if (total != frame.header.payload_bytes || last != (object == objects.size())) {
    return violated("send data of " + text(total) + " bytes up to object " + text(object) + " of " +
                    text(objects.size()) + ", announced with " + text(frame.header.payload_bytes) + " bytes");
  }
  if (transfer->checked && total != 0 && frame.header.checksums == 0) {
    return violated("objects without checksums for a recv that asked for them");
  }
  receiving_ = transfer->id;
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_send_data(const Frame& frame) {
  std::error_code ec;
  Transfer* const transfer = find(frame.header.operation, TransferKind::recv, ec);
  FrameHeader header;
  header.type = FrameType::send_ack;
  header.operation = frame.header.tag;
  if (transfer == nullptr) {
    header.status = wire_status(errc::peer_cancelled);
    return acknowledge(header);
  }
  const auto fault = landed(frame);
  header.status = wire_status(fault);
  if (const auto excess = acknowledge(header, differing_objects(frame))) {
    return excess;
  }
  kit::Operation& operation = transfer->operation();
  const bool differs = !differing_.empty();
  if (fault) {
    transfer->why = differs            ? "objects landed with other bytes than were sent: their checksums differ"
                    : frame.unwritable ? "the memory of its objects can't be written"
                                       : "the memory of the peer's objects can't be read";
  }
  CoveredBytes differing(frame.checksums, differing_);
  for (const Descriptor& descriptor : frame.descriptors) {
    const std::size_t object = transfer->next_object;
    const bool refused = (descriptor.index & Descriptor::refused) != 0;
    if (fault && !refused && (!differs || differing.in_next(descriptor.length))) {
      transfer->failed_object = object;
      operation.failed(object, fault);
    }
    transfer->next_offset += static_cast<std::size_t>(descriptor.length);
    if ((descriptor.index & Descriptor::continues) != 0) {
      break;
    }
    if ((descriptor.index & Descriptor::refused) != 0) {
      operation.set_size(object, transfer->next_offset);
      operation.failed(object, errc::buffer_too_small);
      transfer->why = "object " + text(object) + " has " + text(descriptor.length) + " bytes, its buffer " +
                      text(transfer->request().objects[object].size());
    } else if (object != transfer->failed_object) {
      operation.received(object, transfer->next_offset);
    }
    ++transfer->next_object;
    transfer->next_offset = 0;
  }
  if (transfer->next_object == transfer->request().objects.size()) {
    end(*transfer, {}, std::move(transfer->why));
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_fence() {
  if (fence_owed_) {
    return violated("a fence before the one before it was answered");
  }
  fence_owed_ = true;
  fence_asked_ = true;
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_fence_ack() {
  if (fences_.empty()) {
    return violated("an answer to a fence that was not asked for");
  }
  const auto answered = std::exchange(fences_, std::exchange(next_fences_, {}));
  if (!fences_.empty()) {
    ask_fence();
  }
  for (const auto& done : answered) {
    done();
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_send_abort(const FrameHeader& header) {
  std::error_code ec;
  Transfer* const transfer = find(header.operation, TransferKind::recv, ec);
  if (transfer == nullptr) {
    return ec;
  }
  const auto status = status_code(header.status);
  std::string why = "the peer's send was cancelled or timed out";
  if (status == errc::count_mismatch) {
    why = "tag " + text(transfer->request().tag) + ": the recv has " + text(transfer->request().objects.size()) +
          " objects, the peer's send " + text(header.first_offset);
  }
  end(*transfer, status ? status : std::error_code(errc::peer_cancelled), std::move(why));
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_probe(const FrameHeader& header) {
  if (++queued_probe_answers_ > max_outstanding_probes) {
    return violated("more than " + text(max_outstanding_probes) + " probes unanswered");
  }
  if (regions().next() != told_next_region_) {
    region_added();  // who asks is to know of all regions then
  }
  FrameHeader answer;
  answer.type = FrameType::probe_answer;
  answer.operation = header.operation;
  tell(answer);
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_probe_answer(const FrameHeader& header) {
  if (probes_.empty() || header.operation != last_probe_ - probes_.size() + 1) {
    return violated("answer to probe " + text(header.operation) + ", which is not the next of " + text(probes_.size()));
  }
  const auto answered = std::move(probes_.front());
  probes_.pop_front();
  answered();
  return {};
}

}  // namespace kvferry::tcp
