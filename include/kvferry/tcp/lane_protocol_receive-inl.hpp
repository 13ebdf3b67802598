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
    case errc::connection_lost:
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

/// Finds the region's memory that a write or read of the peer means. An error that the peer's own
/// checks should have caught becomes its request's `status`; a frame that makes no sense is a violation.
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

}  // namespace kvferry::tcp
