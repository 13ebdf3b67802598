// SPDX-License-Identifier: Apache-2.0
#pragma once

// The sending side of a lane: it queues the next frames, as far as the peer may get them, and counts the bytes that have left.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/tcp/range_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

inline constexpr auto refusal_status = static_cast<std::uint32_t>(errc::resource_limit);
/// The operation that frames which answer a peer's read belong to: no operation has this id.
inline constexpr std::uint64_t no_operation = 0;
/// Likewise, of a frame that says that a region is gone.
inline constexpr std::uint64_t region_news = ~std::uint64_t{0};

/// Of an answer to a read; an idle connection keeps the memory for so many.
inline constexpr std::size_t most_pieces_kept = 64;

// The outgoing queue points to them.
inline constexpr FrameTrailer good_trailer;

/// Frames that refer to memory are small, so that the socket's buffer bounds nothing. So this bounds
/// them, of up to 1 MiB each: a frame that the peer hasn't copied yet can't be taken back, and other operations wait behind it.
inline constexpr std::size_t most_frames_referring = 16;
/// Payload of such a frame while the peer has none of the same operation to copy: it begins while the next one is made. Smaller ones
/// cost more than that gains (docs/performance.md), and so does any where the kernel copies.
inline constexpr std::size_t most_bytes_of_first = std::size_t{512} << 10;
inline constexpr FrameTrailer fault_trailer{static_cast<std::uint32_t>(errc::memory_fault), 0};

}  // namespace internal

KVFERRY_INLINE void LaneProtocol::sent(std::size_t count) {
  sent_ += count;
  out_.consume(count, [this](std::uint64_t id) {
    if (id == no_operation) {
      --unsent_answers_;
      return;
    }
    if (id == region_news) {
      ++sent_removals_;
      return;
    }
    const auto it = transfers_.find(id);
    if (it != transfers_.end() && --it->second.pins == 0 && it->second.meets_again && !it->second.stopping) {
      wait_for_recv(it->second);
    }
  });
}

KVFERRY_INLINE bool LaneProtocol::source_failed() {
  const auto owner = out_.spoil_front(fault_trailer);
  if (!owner) {
    return false;
  }
  if (const auto it = transfers_.find(*owner); it != transfers_.end() && !it->second.failure) {
    it->second.failure = errc::memory_fault;
    it->second.why = "the memory of its objects can't be read";
  }
  return true;
}

KVFERRY_INLINE void LaneProtocol::fill(std::size_t enough) {
  referred_ = 0;  // a frame whose payload the peer fetches is sent before the next one is made
  // Most looks at a connection find nothing to say.
  while (out_.bytes() + referred_ < enough &&
         !(control_.empty() && ready_reads_.empty() && responses_.empty() && ready_data_.empty())) {
    // Requests are as short as control frames, and the peer can work on them while data goes out.
    if (fill_control() || fill_read_request()) {
      continue;
    }
    response_next_ = !response_next_;
    const bool filled = response_next_ ? fill_response() || fill_data() : fill_data() || fill_response();
    if (!filled) {
      return;
    }
  }
}

KVFERRY_INLINE bool LaneProtocol::fill_control() {
  if (control_.empty()) {
    return false;
  }
  const ControlFrame& frame = control_.front();
  if (frame.header.type == FrameType::region_removed) {
    out_.begin_frame();
    out_.add_header(frame.header);
    out_.pin(region_news);
    control_.pop_front();
    return true;
  }
  out_.add_header(frame.header, frame.descriptors);
  if (frame.header.type == FrameType::write_ack || frame.header.type == FrameType::send_ack) {
    --queued_acknowledgements_;
  } else if (frame.header.type == FrameType::probe_answer) {
    --queued_probe_answers_;
  } else if (frame.header.type == FrameType::send_abort && frame.header.status == refusal_status) {
    --queued_refusals_;
  } else if (frame.header.type == FrameType::fence_ack) {
    fence_owed_ = false;  // not before: a peer that takes no answers could ask for more and more
  } else if (frame.header.type == FrameType::region_removed_ack) {
    --queued_removal_answers_;
  } else if (frame.header.type == FrameType::region_mapped) {
    --queued_map_answers_;
  }
  control_.pop_front();
  return true;
}

KVFERRY_INLINE bool LaneProtocol::fill_response() {
  if (responses_.empty()) {
    return false;
  }
  Response& response = responses_.front();
  if (response.header.type == FrameType::region_removed) {
    out_.begin_frame();
    out_.add_header(response.header);
    out_.pin(region_news);
    --queued_removals_;
    responses_.pop_front();
    return true;
  }
  const bool referred = refer(response.header.payload_bytes, [&](auto add) {
    for (const iovec& piece : response.pieces) {
      add(static_cast<const std::byte*>(piece.iov_base), piece.iov_len);
    }
  });
  response.header.references = static_cast<std::uint32_t>(references_.size());
  out_.begin_frame();
  out_.add_header(response.header);
  if (!response.pieces.empty()) {
    if (referred) {
      out_.add_copy(std::as_bytes(std::span(references_)));
    } else {
      out_.add_views(response.pieces);
    }
    add_checksums(response.pieces, response.checksums);
    out_.add_trailer(good_trailer);
    out_.pin(no_operation);
    ++unsent_answers_;
  }
  if (response.pieces.capacity() <= most_pieces_kept) {
    spare_pieces_ = std::move(response.pieces);
    spare_pieces_.clear();
  }
  responses_.pop_front();
  return true;
}

KVFERRY_INLINE bool LaneProtocol::fill_data() {
  const std::size_t most = memory_ && memory_->refers() ? most_frames_referring : max_unacknowledged;
  while (!ready_data_.empty() && unacknowledged_ < most) {
    const auto it = transfers_.find(ready_data_.front());
    ready_data_.pop_front();
    if (it == transfers_.end() || it->second.stopping || it->second.meets_again) {
      continue;
    }
    Transfer& transfer = it->second;
    ++unacknowledged_;
    if (transfer.notifying) {
      add_notification(transfer);
      return true;
    }
    FrameHeader header;
    if (transfer.request().kind == TransferKind::write) {
      header.type = FrameType::write;
      header.operation = transfer.id;
      header.region = transfer.request().remote_region;
    } else {
      header.type = FrameType::send_data;
      header.operation = transfer.remote_recv;
      header.tag = transfer.id;
    }
    add_chunk(transfer, header);
    if (!transfer.cursor.done()) {
      ready_data_.push_back(transfer.id);
    }
    return true;
  }
  return false;
}

KVFERRY_INLINE bool LaneProtocol::fill_read_request() {
  while (!ready_reads_.empty() && outstanding_reads_ < max_outstanding_reads) {
    const auto it = transfers_.find(ready_reads_.front());
    ready_reads_.pop_front();
    if (it == transfers_.end()) {
      continue;
    }
    Transfer& transfer = it->second;
    ++outstanding_reads_;
    FrameHeader header;
    header.type = FrameType::read;
    header.operation = transfer.id;
    header.region = transfer.request().remote_region;
    add_chunk(transfer, header);
    if (!transfer.cursor.done()) {
      ready_reads_.push_back(transfer.id);
    }
    return true;
  }
  return false;
}

template <class Visit>
bool LaneProtocol::refer(std::uint64_t bytes, Visit visit) {
  references_.clear();
  if (!memory_ || !memory_->refers() || bytes < memory_->least_bytes()) {
    return false;
  }
  visit([this](const std::byte* data, std::size_t length) {
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    if (!references_.empty() && references_.back().address + references_.back().length == address) {
      references_.back().length += length;
    } else if (length != 0) {
      references_.push_back({address, length});
    }
  });
  if (references_.size() > max_references || !memory_->refer(references_, bytes)) {
    references_.clear();
    return false;
  }
  referred_ += bytes;
  return true;
}

KVFERRY_INLINE bool LaneProtocol::sends_what_is_there(std::span<const iovec> pieces) {
  std::array<iovec, 16> foreign;
  if (pieces.size() > foreign.size()) {
    return false;  // the kernel copies many in one call
  }
  std::size_t count = out_.foreign(pieces, foreign);
  const auto is_trailer = [](const iovec& piece) {
    return reinterpret_cast<std::uintptr_t>(piece.iov_base) - reinterpret_cast<std::uintptr_t>(&good_trailer) <
           sizeof(good_trailer);
  };
  count = static_cast<std::size_t>(
      std::remove_if(foreign.begin(), foreign.begin() + static_cast<std::ptrdiff_t>(count), is_trailer) -
      foreign.begin());
  const auto payload = std::span(foreign).first(count);
  return payload.empty() || surely_there(payload);
}

KVFERRY_INLINE void LaneProtocol::describe(const Transfer& transfer, const Chunk& chunk, FrameHeader& header) {
  const TransferRequest& request = transfer.request();
  scratch_.resize(chunk.count);
  Descriptor* descriptor = scratch_.data();
  if (!request.remote_ranges.empty()) {
    scratch_.clear();
    transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
      describe_range(request.remote_ranges[piece.object], piece.offset, piece.length, scratch_);
    });
  } else if (request.one_sided()) {
    const std::uint64_t* const pages = request.remote_indexes.data();
    transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
      *descriptor++ = {pages[piece.object], piece.length};
    });
  } else {
    transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
      *descriptor++ = piece.refused
                          ? Descriptor{piece.object | Descriptor::refused, request.objects[piece.object].size()}
                          : Descriptor{piece.object | (piece.completes ? 0 : Descriptor::continues), piece.length};
    });
  }
  header.count = static_cast<std::uint32_t>(scratch_.size());
  header.payload_bytes = chunk.bytes;
  if (request.remote_ranges.empty()) {
    header.first_offset = chunk.first_offset;
  } else {
    header.flags |= FrameHeader::ranges;
  }
}

/// By its first object: they are of one kind as a rule.
KVFERRY_INLINE bool LaneProtocol::lies_in_mappable_memory(const TransferRequest& request) {
  const iovec first{request.objects.front().data(), std::min<std::size_t>(request.objects.front().size(), 1)};
  return surely_there({&first, 1});
}

KVFERRY_INLINE void LaneProtocol::add_chunk(Transfer& transfer, FrameHeader header) {
  const TransferRequest& request = transfer.request();
  const bool may_refer = header.type != FrameType::read && memory_ && memory_->refers();
  bool peer_waits = may_refer && transfer.outstanding.empty() && lies_in_mappable_memory(request);
  if (peer_waits && !request.notification.empty()) {
    // A frame that has all of a write brings its notification, which saves a round trip.
    ChunkCursor rest = transfer.cursor;
    (void)rest.next();
    peer_waits = !rest.done();
  }
  const Chunk chunk = transfer.cursor.next(peer_waits ? most_bytes_of_first : max_chunk_bytes);
  describe(transfer, chunk, header);
  if (transfer.cursor.done()) {
    header.flags |= FrameHeader::last_chunk;
  }
  checked_memory_.clear();
  checksums_.clear();
  if (transfer.checked && header.type == FrameType::read) {
    header.flags |= FrameHeader::with_checksums;
  } else if (transfer.checked && has_trailer(header)) {
    const kit::LocalBytes& local = transfer.cursor.local();
    transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
      checksums_.push_back({piece.length, 0});
      local.for_each_piece(piece.object, piece.offset, piece.length, [&](std::byte* data, std::size_t length) {
        checked_memory_.push_back({data, length});
      });
    });
    header.checksums = static_cast<std::uint16_t>(checksums_.size());
  }
  const bool only_chunk = chunk.first_offset == 0 && chunk.count == request.objects.size() && transfer.cursor.done();
  const bool attach = header.type == FrameType::write && only_chunk && !request.notification.empty();
  if (attach) {
    transfer.notification_attached = true;
    header.tag = request.notification_key;
    header.notification_bytes = static_cast<std::uint32_t>(request.notification.size());
  }
  const auto for_each_local = [&](auto add) {
    const kit::LocalBytes& local = transfer.cursor.local();
    transfer.cursor.for_each_piece(chunk, [&](const Piece& piece) {
      local.for_each_piece(piece.object, piece.offset, piece.length,
                           [&](const std::byte* data, std::size_t length) { add(data, length); });
    });
  };
  const bool referred = has_trailer(header) && refer(chunk.bytes, for_each_local);
  header.references = referred ? static_cast<std::uint32_t>(references_.size()) : 0;
  out_.begin_frame();
  out_.add_header(header, scratch_);
  if (header.type != FrameType::read) {
    if (referred) {
      out_.add_copy(std::as_bytes(std::span(references_)));
    } else {
      out_.add_views([&](auto add) { for_each_local(add); }, chunk.count);
    }
    if (attach) {
      out_.add_copy(request.notification);
    }
    add_checksums(checked_memory_, checksums_);
    if (has_trailer(header)) {
      out_.add_trailer(good_trailer);
    }
    out_.pin(transfer.id);
    ++transfer.pins;
  }
  transfer.outstanding.push_back(chunk);
}

KVFERRY_INLINE void LaneProtocol::add_notification(Transfer& transfer) {
  const auto& notification = transfer.request().notification;
  FrameHeader header;
  header.type = FrameType::notify;
  header.operation = transfer.id;
  header.tag = transfer.request().notification_key;
  header.notification_bytes = static_cast<std::uint32_t>(notification.size());
  out_.add_header(header);
  out_.add_copy(notification);
  transfer.notification_sent = true;
}

}  // namespace kvferry::tcp
