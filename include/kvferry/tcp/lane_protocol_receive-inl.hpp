// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/tcp/range_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

KVFERRY_INLINE std::string text(std::uint64_t number) { return std::to_string(number); }

/// A status as it came over the wire. Only what can be true of a single object or batch is believed.
KVFERRY_INLINE std::error_code status_code(std::uint32_t status) {
  switch (static_cast<errc>(status)) {
    case errc::unknown_region:
    case errc::region_gone:
    case errc::index_out_of_range:
    case errc::range_out_of_bounds:
    case errc::object_too_large:
    case errc::access_denied:
    case errc::count_mismatch:
    case errc::resource_limit:
    case errc::memory_fault:
    case errc::checksum_mismatch:
    case errc::peer_cancelled: return static_cast<errc>(status);
    default: return status == 0 ? std::error_code() : std::error_code(errc::protocol_violation);
  }
}

KVFERRY_INLINE std::uint32_t wire_status(std::error_code status) { return static_cast<std::uint32_t>(status.value()); }

/// The lengths of the checksums of an answer to a read: one for each page or range.
KVFERRY_INLINE std::vector<Checksum> lengths_of(const Frame& read) {
  std::vector<Checksum> lengths;
  const bool ranges = (read.header.flags & FrameHeader::ranges) != 0;
  for (std::size_t i = 0; i < read.descriptors.size(); ++i) {
    const auto range = std::bit_cast<RangeDescriptor>(read.descriptors[i]);
    lengths.push_back({ranges ? range.length : read.descriptors[i].length, 0});
    i += ranges && (range.region & RangeDescriptor::blocks) != 0 ? 1 : 0;
  }
  return lengths;
}

/// Whether a frame is of an operation of the side that sends it, and no answer.
KVFERRY_INLINE bool starts_something(FrameType type) {
  return type == FrameType::write || type == FrameType::notify || type == FrameType::read ||
         type == FrameType::recv_post;
}

}  // namespace internal

KVFERRY_INLINE std::error_code LaneProtocol::received(std::size_t count) {
  last_received_ = kit::Clock::now();
  return reader_.commit(count, *this);
}

KVFERRY_INLINE std::error_code LaneProtocol::violated(std::string how) {
  violation_ = std::move(how);
  return errc::protocol_violation;
}

KVFERRY_INLINE LaneProtocol::Transfer* LaneProtocol::find(std::uint64_t id, TransferKind kind, std::error_code& ec) {
  const auto it = transfers_.find(id);
  if (it != transfers_.end() && it->second.request().kind == kind) {
    return &it->second;
  }
  if (it != transfers_.end() || id == 0 || id >= next_id_) {
    ec = violated("frame for operation " + text(id) + ", which is no " + std::string(to_string(kind)));
  }
  return nullptr;
}

KVFERRY_INLINE LaneProtocol::Transfer* LaneProtocol::find_acknowledged(std::uint64_t id, std::error_code& ec) {
  const auto it = transfers_.find(id);
  const bool is_read =
      it != transfers_.end() && it->second.request().kind == TransferKind::read && it->second.notifying;
  return find(id, is_read ? TransferKind::read : TransferKind::write, ec);
}

KVFERRY_INLINE std::error_code LaneProtocol::check_header(const FrameHeader& header) {
  if (header.magic != FrameHeader::expected_magic) {
    return violated("frame with magic " + text(header.magic));
  }
  struct Bounds {
    std::uint64_t min_count;
    std::uint64_t max_count;
    std::uint64_t max_payload;
    std::uint64_t max_notification;
  };
  Bounds bounds{0, 0, 0, 0};
  switch (header.type) {
    case FrameType::write: bounds = {1, max_chunk_objects, max_chunk_bytes, max_notification_bytes}; break;
    case FrameType::notify: bounds = {0, 0, 0, max_notification_bytes}; break;
    case FrameType::read:
    case FrameType::send_data: bounds = {1, max_chunk_objects, max_chunk_bytes, 0}; break;
    case FrameType::read_data: bounds = {0, 0, max_chunk_bytes, 0}; break;
    case FrameType::recv_post: bounds = {1, kit::max_paired_objects, 0, 0}; break;
    case FrameType::write_ack:
    case FrameType::send_ack: bounds = {0, ObjectSet::descriptors_for(max_chunk_objects), 0, 0}; break;
    case FrameType::recv_cancel:
    case FrameType::send_abort:
    case FrameType::probe:
    case FrameType::probe_answer:
    case FrameType::fence:
    case FrameType::fence_ack:
    case FrameType::region_added:
    case FrameType::region_removed:
    case FrameType::region_removed_ack:
    case FrameType::region_mapped: break;
    case FrameType::region_shared: bounds = {1, 1, 0, 0}; break;
    default: return violated("frame of unknown type " + text(static_cast<std::uint64_t>(header.type)));
  }
  if (header.count < bounds.min_count || header.count > bounds.max_count) {
    return violated("frame of type " + text(static_cast<std::uint64_t>(header.type)) + " with " + text(header.count) +
                    " descriptors, at most " + text(bounds.max_count));
  }
  if (header.payload_bytes > bounds.max_payload || header.notification_bytes > bounds.max_notification) {
    return violated("frame of type " + text(static_cast<std::uint64_t>(header.type)) + " with " +
                    text(header.payload_bytes) + " bytes of payload, at most " + text(bounds.max_payload) + ", and " +
                    text(header.notification_bytes) + " of notification, at most " + text(bounds.max_notification));
  }
  if (header.checksums > (has_trailer(header) ? max_chunk_objects : 0)) {
    return violated("frame of type " + text(static_cast<std::uint64_t>(header.type)) + " with " +
                    text(header.payload_bytes) + " bytes of payload and " + text(header.checksums) + " checksums");
  }
  const bool may_refer = memory_ && memory_->fetches() && has_trailer(header);
  if (header.references > (may_refer ? max_references : 0)) {
    return violated("frame of type " + text(static_cast<std::uint64_t>(header.type)) + " with " +
                    text(header.references) + " references, at most " + text(may_refer ? max_references : 0));
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::begin_payload(Frame& frame, std::vector<iovec>& scatter) {
  std::error_code ec;
  switch (frame.header.type) {
    case FrameType::write:
      if (peer_gone_ || leaving_) {
        frame_status_ = errc::connection_lost;
      } else {
        ec = region_pieces(frame.header, frame.descriptors, regions(), Access::write, scatter, frame_status_);
      }
      break;
    case FrameType::read_data: ec = begin_read_data(frame, scatter); break;
    case FrameType::send_data: ec = begin_send_data(frame, scatter); break;
    default: break;
  }
  if (!ec && frame.header.checksums != 0) {
    landing_ = scatter;
  }
  return ec;
}

KVFERRY_INLINE std::error_code LaneProtocol::fetch(Frame& frame, std::span<const iovec> destinations) {
  std::uint64_t total = 0;
  for (const Reference& reference : frame.references) {
    if (reference.length == 0 || reference.length > max_chunk_bytes) {
      return violated("reference to " + text(reference.length) + " bytes");
    }
    total += reference.length;
  }
  if (total != frame.header.payload_bytes) {
    return violated("references to " + text(total) + " bytes in all, payload of " + text(frame.header.payload_bytes));
  }
  std::error_code ec;
  switch (memory_->fetch(frame.references, destinations, ec)) {
    case PeerMemory::Fetched::all: break;
    case PeerMemory::Fetched::unreadable: frame.unreadable = true; break;
    case PeerMemory::Fetched::unwritable: frame.unwritable = true; break;
    case PeerMemory::Fetched::hung_up: frame.hung_up = true; break;
    case PeerMemory::Fetched::failed:
      violation_ = "reading the peer's memory: " + ec.message();
      return ec == errc::protocol_violation ? ec : errc::connection_lost;
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_frame(Frame& frame) {
  receiving_ = 0;
  if (frame.hung_up) {
    return {};  // its bytes may be anything; the operation ends with the connection, whose end is next
  }
  if (frame.header.checksums != 0) {
    if (const auto ec = check_checksums(frame)) {
      return ec;
    }
  }
  if (starts_something(frame.header.type)) {
    if (leaving_) {
      return {};
    }
    use();
  }
  switch (frame.header.type) {
    case FrameType::write:
    case FrameType::notify: return end_write(frame);
    case FrameType::write_ack:
    case FrameType::send_ack: return end_acknowledgement(frame);
    case FrameType::read: return end_read(frame);
    case FrameType::read_data: return end_read_data(frame);
    case FrameType::recv_post: return end_recv_post(frame);
    case FrameType::recv_cancel: return end_recv_cancel(frame.header);
    case FrameType::send_data: return end_send_data(frame);
    case FrameType::send_abort: return end_send_abort(frame.header);
    case FrameType::probe: return end_probe(frame.header);
    case FrameType::probe_answer: return end_probe_answer(frame.header);
    case FrameType::fence: return end_fence();
    case FrameType::fence_ack: return end_fence_ack();
    case FrameType::region_added: return end_region_added(frame.header);
    case FrameType::region_removed: return end_region_removed(frame.header);
    case FrameType::region_removed_ack: return end_region_removed_ack(frame.header);
    case FrameType::region_shared: return end_region_shared(frame);
    case FrameType::region_mapped: return end_region_mapped(frame.header);
  }
  return {};
}

/// Finds the region's memory that a write or read of the peer means. What the peer's own checks should have caught is
/// its request's `status`; what makes the frame itself senseless is a violation.
KVFERRY_INLINE std::error_code LaneProtocol::region_pieces(const FrameHeader& header,
                                                           std::span<const Descriptor> descriptors,
                                                           const kit::RegionList& all, Access needed,
                                                           std::vector<iovec>& pieces, std::error_code& status) {
  status.clear();
  if ((header.flags & FrameHeader::ranges) != 0) {
    RangesRead read = read_ranges(header, descriptors, all, needed, pieces);
    status = read.status;
    return read.violation.empty() ? std::error_code() : violated(std::move(read.violation));
  }
  std::uint64_t total = 0;
  for (const Descriptor& descriptor : descriptors) {
    if (descriptor.length > max_chunk_bytes) {
      return violated("descriptor of " + text(descriptor.length) + " bytes");
    }
    total += descriptor.length;
  }
  if (total != header.payload_bytes) {
    return violated("descriptors of " + text(total) + " bytes in all, payload of " + text(header.payload_bytes));
  }
  const MemoryRegion* const found = all.find(header.region);
  if (found == nullptr) {
    status = all.refusal(header.region);
    return {};
  }
  const MemoryRegion& region = *found;
  if (!allows(region.peer_access, needed)) {
    status = errc::access_denied;
    return {};
  }
  const auto refuse = [&](errc cause) {
    status = cause;
    pieces.clear();
    return std::error_code();
  };
  const std::uint64_t pages = region.page_count();
  std::uint64_t offset = header.first_offset;
  pieces.reserve(descriptors.size());
  for (const Descriptor& descriptor : descriptors) {
    if (descriptor.index >= pages) {
      return refuse(errc::index_out_of_range);
    }
    if (offset > region.page_size || descriptor.length > region.page_size - offset) {
      return refuse(errc::object_too_large);
    }
    if (descriptor.length != 0) {
      pieces.push_back({region.data + descriptor.index * region.page_size + offset, descriptor.length});
    }
    offset = 0;
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::fault_of(const Frame& frame) {
  return frame.unwritable || frame.unreadable ? std::error_code(errc::memory_fault) : status_code(frame.trailer.status);
}

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
