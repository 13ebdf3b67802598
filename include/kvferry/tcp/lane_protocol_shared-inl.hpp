// SPDX-License-Identifier: Apache-2.0
#pragma once

// Regions that the other side reads by itself. The initiator copies, and the peer doesn't notice. Two rules make that safe. The
// initiator confirms a removal (lane_protocol_regions-inl.hpp) here, between two copies, and forgets the region before. An owner
// that takes memory back from an initiator that doesn't answer hangs up first, and the initiator checks for that after each copy.
#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE void LaneProtocol::share_regions(const kit::RegionList& now) {
  if (!memory_) {
    return;
  }
  for (const LocalRegion& region : now.all()) {
    if (region.number < next_shared_) {
      continue;
    }
    if (const auto share = memory_->share(region)) {
      ControlFrame frame;
      frame.header.type = FrameType::region_shared;
      frame.header.region = region.number;
      frame.header.operation = region.size;
      frame.header.tag = region.page_size;
      frame.header.count = 1;
      frame.descriptors.push_back({share->file, share->address});
      control_.push_back(std::move(frame));
    }
  }
  next_shared_ = now.next();
}

KVFERRY_INLINE std::error_code LaneProtocol::end_region_shared(const Frame& frame) {
  const FrameHeader& header = frame.header;
  const RemoteRegion region{header.operation, header.tag, Access::read, header.region};
  const bool sensible = region.page_size != 0 && region.size != 0 && region.size % region.page_size == 0 &&
                        region.number <= kit::RegionTable::max_number;
  if (!memory_ || !sensible || ++queued_map_answers_ > PeerMemory::max_mapped) {
    return violated("region " + std::to_string(region.number) + " of " + std::to_string(region.size) +
                    " bytes with pages of " + std::to_string(region.page_size) + " handed out, " +
                    std::to_string(queued_map_answers_) + " unanswered");
  }
  FrameHeader answer;
  answer.type = FrameType::region_mapped;
  answer.region = region.number;
  answer.status = memory_->map(region, {frame.descriptors.front().length, frame.descriptors.front().index});
  tell(answer);
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_region_mapped(const FrameHeader& header) {
  if (!memory_ || !memory_->mapped_by_peer(header.region, header.status)) {
    return violated("an answer to region " + std::to_string(header.region) + ", which was not handed out");
  }
  return {};
}

KVFERRY_INLINE std::optional<PeerMemory::Way> LaneProtocol::way_to_read(const TransferRequest& request) const {
  if (!memory_) {
    return std::nullopt;
  }
  for (const auto way : {PeerMemory::Way::mapped, PeerMemory::Way::in_place}) {
    const kit::RegionList& readable = memory_->regions(way);
    const auto is_there = [&](std::uint32_t number) { return readable.find(number) != nullptr; };
    if (request.remote_ranges.empty() ? is_there(request.remote_region)
                                      : std::ranges::all_of(request.remote_ranges, is_there, &RemoteRange::region)) {
      return way;
    }
  }
  return std::nullopt;
}

KVFERRY_INLINE LaneProtocol::Copied LaneProtocol::copy_part() {
  while (!ready_copies_.empty()) {
    const auto it = transfers_.find(ready_copies_.front());
    ready_copies_.pop_front();
    if (it == transfers_.end()) {
      continue;
    }
    Transfer& transfer = it->second;
    FrameHeader header;
    header.type = FrameType::read;
    header.region = transfer.request().remote_region;
    const Chunk chunk = transfer.cursor.next();
    describe(transfer, chunk, header);
    copy_from_.clear();
    copy_to_.clear();
    std::error_code status;
    // The peer's word for a region's size may have changed since the operation was checked.
    if (region_pieces(header, scratch_, memory_->regions(*transfer.way), Access::read, copy_from_, status)) {
      status = errc::protocol_violation;
    }
    if (!status) {
      local_pieces(transfer, chunk, copy_to_);
      std::error_code ec;
      switch (memory_->copy(*transfer.way, copy_from_, copy_to_, ec)) {
        case PeerMemory::Fetched::all: break;
        case PeerMemory::Fetched::unwritable:
          status = errc::memory_fault;
          if (!transfer.failure) {
            transfer.failure = status;
            transfer.why = "the memory of its objects can't be written";
          }
          break;
        case PeerMemory::Fetched::unreadable: status = errc::memory_fault; break;
        case PeerMemory::Fetched::hung_up:
        case PeerMemory::Fetched::failed:
          transfer.outstanding.push_back(chunk);  // it ends with the connection
          return {chunk.bytes, copy_from_.size() + copy_to_.size(), true, ec};
      }
    }
    settle(transfer, chunk, status);
    if (transfer.cursor.done()) {
      end(transfer, transfer.failure, std::move(transfer.why));
    } else {
      ready_copies_.push_back(transfer.id);
    }
    return {std::max<std::size_t>(chunk.bytes, 1), copy_from_.size() + copy_to_.size()};
  }
  return {};
}

}  // namespace kvferry::tcp
