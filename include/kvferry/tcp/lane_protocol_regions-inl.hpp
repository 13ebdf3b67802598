// SPDX-License-Identifier: Apache-2.0
#pragma once

// Regions that come and go. News go out ahead of what is started here later; a region that is gone is told behind the
// answers to reads that point into it. The peer confirms that behind all that it had sent before, so that with its answer
// no frame that meant the region is under way in either direction: what it sent has come, and what it was sent is there.
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE const kit::RegionList& LaneProtocol::regions() {
  if (regions_->outdated()) {
    regions_ = host_->local_regions();
  }
  return *regions_;
}

KVFERRY_INLINE void LaneProtocol::region_added() {
  if (failed_) {
    return;
  }
  const kit::RegionList& now = regions();
  const auto told = std::exchange(told_regions_, nullptr);
  if (told) {
    // Tells of the regions that have gone since the handshake. Nobody waits for that here. It comes ahead of the new regions, so
    // that the peer never has more than there may be. No answer to a read on this connection has to be ahead of it.
    for (const LocalRegion& region : told->all()) {
      if (now.find(region.number) == nullptr) {
        tell_removed_first(region.number);
      }
    }
  }
  for (const LocalRegion& region : now.all()) {
    if (region.number < told_next_region_) {
      continue;
    }
    FrameHeader header;
    header.type = FrameType::region_added;
    header.region = region.number;
    header.operation = region.size;
    header.tag = region.page_size;
    header.status = static_cast<std::uint32_t>(region.peer_access);
    tell(header);
  }
  if (told && now.next() > told->next() && now.find(now.next() - 1) == nullptr) {
    tell_removed_first(now.next() - 1);  // with it the peer knows how far numbers have come
  }
  told_next_region_ = now.next();
  share_regions(now);
}

KVFERRY_INLINE void LaneProtocol::region_removed(std::uint32_t number, std::function<void()> done) {
  if (failed_) {
    done();
    return;
  }
  region_added();  // what has a smaller number is told first
  if (memory_) {
    memory_->unshare(number);
  }
  // Before the frame: who waits is told if that can't be queued.
  removed_.push_back({number, std::move(done)});
  Response removed;
  removed.header.type = FrameType::region_removed;
  removed.header.region = number;
  responses_.push_back(std::move(removed));
  ++queued_removals_;
}

/// Ahead of all others, which go behind answers.
KVFERRY_INLINE void LaneProtocol::tell_removed_first(std::uint32_t number) {
  if (memory_) {
    memory_->unshare(number);
  }
  removed_.push_back({number, nullptr});
  FrameHeader header;
  header.type = FrameType::region_removed;
  header.region = number;
  tell(header);
}

KVFERRY_INLINE std::error_code LaneProtocol::end_region_added(const FrameHeader& header) {
  const std::uint64_t page_size = header.tag;
  const bool sensible = page_size != 0 && header.operation != 0 && header.operation % page_size == 0 &&
                        header.status <= static_cast<std::uint32_t>(Access::read_write) &&
                        header.region <= kit::RegionTable::max_number;
  if (!sensible) {
    return violated("region " + std::to_string(header.region) + " of " + std::to_string(header.operation) +
                    " bytes with pages of " + std::to_string(page_size) + " and access " +
                    std::to_string(header.status));
  }
  if (!host_->peer_region_added({header.operation, page_size, static_cast<Access>(header.status), header.region})) {
    return violated("more than " + std::to_string(kit::RegionTable::max_regions) + " regions");
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_region_removed(const FrameHeader& header) {
  if (header.region > kit::RegionTable::max_number) {
    return violated("region " + std::to_string(header.region) + " gone");
  }
  if (++queued_removal_answers_ > max_outstanding_removals) {
    return violated("more than " + std::to_string(max_outstanding_removals) + " removals of regions unanswered");
  }
  host_->peer_region_removed(header.region);
  if (memory_) {
    memory_->unmap(header.region);
  }
  FrameHeader answer;
  answer.type = FrameType::region_removed_ack;
  answer.region = header.region;
  tell(answer);
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::end_region_removed_ack(const FrameHeader& header) {
  // Not before it was sent: what points into the region is in front of it.
  if (sent_removals_ == 0 || removed_.front().number != header.region) {
    return violated("an answer to the removal of region " + std::to_string(header.region) +
                    ", which is not the next of " + std::to_string(removed_.size()));
  }
  --sent_removals_;
  const auto done = std::move(removed_.front().done);
  removed_.pop_front();
  if (done) {
    done();
  }
  return {};
}

}  // namespace kvferry::tcp
