// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <kvferry/memory_region.hpp>
#include <kvferry/transfer_spec.hpp>

#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include "endpoint.hpp"
#include "link_regions.hpp"
#include "message.hpp"
#include "slice_table.hpp"
#include "work_list.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// The places of a batch's objects in the peer's memory: on pages of a region, in ranges of its regions, or in the
/// buffers of a recv.
class RemoteMemory {
 public:
  struct Place {
    std::uint64_t address = 0;
    std::uint32_t key = 0;
    std::uint64_t available = 0;  ///< Bytes from there on that have the same key.
  };

  RemoteMemory() = default;
  RemoteMemory(const RegionKeys& region, std::uint64_t page_size, std::span<const std::uint64_t> indexes)
      : region_(&region), page_size_(page_size), indexes_(indexes) {}
  /// @param regions those of the ranges are there.
  RemoteMemory(const PeerRegionList& regions, std::size_t rail, std::span<const RemoteRange> ranges)
      : regions_(&regions), rail_(rail), ranges_(ranges) {}
  explicit RemoteMemory(std::span<const PostedBuffer> buffers) : buffers_(buffers) {}

  /// Of a write or read that has been checked. @param regions have those of the request, as long as this lives.
  /// @param rail the rail's place in the link.
  [[nodiscard]] static RemoteMemory of(const TransferRequest& request, const PeerRegionList& regions,
                                       std::size_t rail) {
    if (!request.remote_ranges.empty()) {
      return RemoteMemory(regions, rail, request.remote_ranges);
    }
    const PeerRegion& region = *regions.find(request.remote_region);
    return RemoteMemory(region.keys[rail], region.page_size, request.remote_indexes);
  }

  [[nodiscard]] Place place(std::size_t object, std::size_t offset) const noexcept {
    if (regions_ != nullptr) {
      const RemoteRange& range = ranges_[object];
      const kit::Blocks::Place within = kit::Blocks::of(range).place(offset);
      Place place = in_region(regions_->find(range.region)->keys[rail_], range.offset + within.position);
      place.available = std::min(place.available, within.available);
      return place;
    }
    if (region_ == nullptr) {
      const PostedBuffer& buffer = buffers_[object];
      return {buffer.address + offset, buffer.key, buffer.size - offset};
    }
    return in_region(*region_, indexes_[object] * page_size_ + offset);
  }

 private:
  [[nodiscard]] static Place in_region(const RegionKeys& region, std::uint64_t begin) noexcept {
    const std::uint64_t slice = begin / region.slice_bytes;
    return {region.address + begin, region.keys[static_cast<std::size_t>(slice)],
            (slice + 1) * region.slice_bytes - begin};
  }

  const RegionKeys* region_ = nullptr;  ///< Of pages.
  std::uint64_t page_size_ = 0;
  const PeerRegionList* regions_ = nullptr;  ///< Of ranges.
  std::size_t rail_ = 0;
  std::span<const RemoteRange> ranges_;
  std::span<const std::uint64_t> indexes_;
  std::span<const PostedBuffer> buffers_;
};

/// The bounds of a work request.
struct RequestLimits {
  std::size_t pieces = 1;  ///< Entries in its gather list.
  std::size_t bytes =
      std::size_t{1} << 20;  ///< Also so that operations take turns, and end soon when they are stopped.
};

/// Makes work requests of a batch. Objects, and blocks of objects, that lie end to end at the peer share one request,
/// which gathers them from (or scatters them to) their places here. A request ends at a limit, or at the end of a slice
/// or of the list.
class WorkPlanner {
 public:
  WorkPlanner() = default;
  /// @param skipped objects of which nothing is moved; empty: none.
  WorkPlanner(kit::LocalBytes objects, kit::ObjectRange range, RemoteMemory remote, std::vector<bool> skipped = {})
      : objects_(objects), remote_(remote), skipped_(std::move(skipped)), object_(range.begin), end_(range.end) {
    skip_empty();
  }

  [[nodiscard]] bool done() const noexcept { return object_ == end_; }
  /// Objects before this one are planned wholly.
  [[nodiscard]] std::size_t next_object() const noexcept { return object_; }

  /// Adds requests of up to `max_requests` and about `max_bytes`, as far as the list has room. @return how many bytes.
  /// @param own registered memory in which the objects lie. @param borrowed memory that is registered only for this
  ///   operation.
  std::size_t plan(WorkList& list, ibv_wr_opcode opcode, const RequestLimits& limits, std::size_t max_requests,
                   std::size_t max_bytes, const SliceTable& own, const SliceTable* borrowed);

 private:
  [[nodiscard]] std::size_t size_of(std::size_t object) const {
    return !skipped_.empty() && skipped_[object] ? 0 : objects_.size(object);
  }
  void skip_empty() {
    while (object_ != end_ && offset_ == size_of(object_)) {
      ++object_;
      offset_ = 0;
    }
  }

  kit::LocalBytes objects_;
  RemoteMemory remote_;
  std::vector<bool> skipped_;
  std::size_t object_ = 0;
  std::size_t offset_ = 0;
  std::size_t end_ = 0;
  const Slice* hint_ = nullptr;
};

}  // namespace kvferry::rdma
