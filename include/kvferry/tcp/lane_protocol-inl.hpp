// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/lane_protocol.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/tcp/range_descriptors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

inline constexpr auto refusal_status = static_cast<std::uint32_t>(errc::resource_limit);
/// The operation that frames which answer a peer's read belong to: no operation has this id.
inline constexpr std::uint64_t no_operation = 0;
/// Likewise, of a frame that says that a region is gone.
inline constexpr std::uint64_t region_news = ~std::uint64_t{0};

// The outgoing queue points to them.
inline constexpr FrameTrailer good_trailer;

/// Frames that refer to memory are small, so that the socket's buffer bounds nothing. What the peer hasn't copied yet
/// can't be taken back, and other operations wait behind it: at most so many, of up to 1 MiB each.
inline constexpr std::size_t most_frames_referring = 16;
inline constexpr FrameTrailer fault_trailer{static_cast<std::uint32_t>(errc::memory_fault), 0};

}  // namespace internal

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
  ids_.emplace(operation.get(), id);
  works_.store(true, std::memory_order_relaxed);
  Transfer& transfer = transfers_[id];
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
  while (out_.bytes() < enough) {
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
      std::remove_if(foreign.begin(), foreign.begin() + static_cast<std::ptrdiff_t>(count), is_trailer) - foreign.begin());
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

KVFERRY_INLINE void LaneProtocol::add_chunk(Transfer& transfer, FrameHeader header) {
  const TransferRequest& request = transfer.request();
  const Chunk chunk = transfer.cursor.next();
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
      for_each_local([&](const std::byte* data, std::size_t length) { out_.add_view(data, length); });
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
  std::erase(ready_data_, send.id);
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
