// SPDX-License-Identifier: Apache-2.0
#include "borrowed_memory.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <system_error>

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::uint64_t page_bytes = 4096;
/// Less is copied in less time than it is registered in.
constexpr std::uint64_t least_registered = std::uint64_t{64} << 10;

struct Range {
  std::uint64_t begin;
  std::uint64_t end;
};

/// Joins ranges whose pages touch: what lies between them then is on the same pages, and registered locally only.
void join_ranges(std::vector<Range>& ranges) {
  std::ranges::sort(ranges, {}, &Range::begin);
  std::vector<Range> joined;
  for (const Range& range : ranges) {
    const bool touches =
        !joined.empty() && range.begin / page_bytes <= (joined.back().end + page_bytes - 1) / page_bytes;
    if (touches) {
      joined.back().end = std::max(joined.back().end, range.end);
    } else {
      joined.push_back(range);
    }
  }
  ranges.swap(joined);
}

MemoryRegionPtr register_range(ibv_pd* domain, const Range& range, int access, kit::Failure& failure) {
  const std::size_t size = static_cast<std::size_t>(range.end - range.begin);
  void* const begin = reinterpret_cast<void*>(range.begin);  // NOLINT(performance-no-int-to-ptr): was one before
  auto region = register_memory(domain, begin, size, access);
  if (region == nullptr) {
    failure.code = last_verbs_error();
    failure.sentence = std::string("RDMA device '") + ibv_get_device_name(domain->context->device) +
                       "' can't register " + std::to_string(size) +
                       " bytes outside of every region: " + failure.code.message();
  }
  return region;
}

}  // namespace

std::unique_ptr<BorrowedMemory> BorrowedMemory::borrow(RailDomain& domain, const SliceTable& regions,
                                                       const kit::LocalBytes& owners, kit::ObjectRange range,
                                                       bool for_read, kit::Failure& failure) {
  const auto objects = owners.objects();
  const Slice* hint = nullptr;
  std::vector<std::size_t> outside;
  std::size_t bytes = 0;
  for (std::size_t i = range.begin; i < range.end; ++i) {
    bool covered = true;
    owners.for_each_piece(i, 0, owners.size(i), [&](const std::byte* piece, std::size_t size) {
      covered = covered && regions.covers(address_of(piece), size, hint);
    });
    if (!covered) {
      outside.push_back(i);
      bytes += objects[i].size();
    }
  }
  if (outside.empty()) {
    return nullptr;
  }
  auto borrowed = std::make_unique<BorrowedMemory>();
  borrowed->owners_ = owners;
  borrowed->objects_.assign(objects.begin(), objects.end());
  std::vector<Range> ranges;
  for (const std::size_t object : outside) {
    const std::uint64_t begin = address_of(objects[object].data());
    ranges.push_back({begin, begin + objects[object].size()});
  }
  join_ranges(ranges);
  const auto range_of = [&](std::size_t object) {
    return std::ranges::upper_bound(ranges, address_of(objects[object].data()), {}, &Range::begin) - 1;
  };
  std::vector<bool> to_register(ranges.size());
  try {
    for (const std::size_t object : outside) {
      const auto joined = range_of(object);
      const bool small = bytes <= RailDomain::StagingBlock::size || joined->end - joined->begin < least_registered;
      if (!small || !borrowed->stage(domain, object, for_read)) {
        to_register[static_cast<std::size_t>(joined - ranges.begin())] = true;
      }
    }
  } catch (const std::system_error& error) {
    failure = {error.code(), error.what()};
    return nullptr;
  }
  for (const auto& block : borrowed->blocks_) {
    const std::uint64_t begin = address_of(block->data());
    borrowed->slices_.add({begin, begin + RailDomain::StagingBlock::size, block->local_key(), 0, false, false});
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (!to_register[i]) {
      continue;
    }
    // Memory that is only read from needs no right to be written, which the caller may not have.
    auto region = register_range(domain.handle(), ranges[i], for_read ? IBV_ACCESS_LOCAL_WRITE : 0, failure);
    if (region == nullptr) {
      return nullptr;
    }
    borrowed->slices_.add({ranges[i].begin, ranges[i].end, region->lkey, 0, false, false});
    borrowed->registered_.push_back(std::move(region));
  }
  return borrowed;
}

bool BorrowedMemory::stage(RailDomain& domain, std::size_t object, bool for_read) {
  const MutableBuffer owner = objects_[object];
  if (blocks_.empty() || owner.size() > RailDomain::StagingBlock::size - used_) {
    auto block = domain.take_staging_block(owner.size());
    if (block == nullptr) {
      return false;
    }
    blocks_.push_back(std::move(block));
    used_ = 0;
  }
  const MutableBuffer staged(blocks_.back()->data() + used_, owner.size());
  used_ += owner.size();
  if (for_read) {
    staged_.push_back(object);
  } else {
    copy(object, staged, false);
  }
  objects_[object] = staged;
  return true;
}

void BorrowedMemory::copy(std::size_t object, MutableBuffer staged, bool to_owner) const {
  const std::byte* const begin = owners_.objects()[object].data();
  owners_.for_each_piece(object, 0, owners_.size(object), [&](std::byte* owner, std::size_t length) {
    std::byte* const copied = staged.data() + (owner - begin);
    std::memcpy(to_owner ? owner : copied, to_owner ? copied : owner, length);
  });
}

void BorrowedMemory::copy_back(std::size_t begin, std::size_t end) const {
  for (auto it = std::ranges::lower_bound(staged_, begin); it != staged_.end() && *it < end; ++it) {
    copy(*it, objects_[*it], true);
  }
}

kit::Failure OfferedBuffers::offer(const SliceTable& regions, ibv_pd* domain, std::span<const MutableBuffer> objects,
                                   std::size_t eager_bytes, OfferedBuffers& offered) {
  const Slice* hint = nullptr;
  offered.posted_.reserve(objects.size());
  std::size_t run_begin = 0;  // objects that lie end to end, none of them in a region that peers may write to
  Range run{0, 0};
  kit::Failure failure;
  const auto end_run = [&](std::size_t next) {
    if (run.end - run.begin >= least_registered && !failure) {
      auto region = register_range(domain, run, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, failure);
      for (std::size_t i = run_begin; i < next && region != nullptr; ++i) {
        PostedBuffer& posted = offered.posted_[i];
        if (posted.size > eager_bytes) {
          posted.key = region->rkey;
          posted.address = address_of(objects[i].data());
          posted.direct = 1;
          offered.any_direct_ = true;
        }
      }
      if (region != nullptr) {
        offered.registered_.push_back(std::move(region));
      }
    }
    run = {0, 0};
    run_begin = next;
  };
  for (std::size_t i = 0; i < objects.size(); ++i) {
    const std::uint64_t begin = address_of(objects[i].data());
    const std::uint64_t end = begin + objects[i].size();
    PostedBuffer posted{objects[i].size(), 0, 0, 0};
    const Slice* const slice = objects[i].empty() ? nullptr : regions.find(begin, hint);
    if (slice != nullptr && slice->device_memory) {
      return {errc::not_supported,
              "object " + std::to_string(i) + " lies in a dma-buf's region, which is for writes and reads"};
    }
    if (slice != nullptr && slice->peers_may_write && end <= slice->end) {
      end_run(i);
      if (objects[i].size() > eager_bytes) {
        posted = {objects[i].size(), begin, slice->remote_key, 1};
        offered.any_direct_ = true;
        offered.uses_region_keys_ = true;
      }
      offered.posted_.push_back(posted);
      end_run(i + 1);
      continue;
    }
    if (run.end != begin) {
      end_run(i);
      run = {begin, end};
    } else {
      run.end = end;
    }
    offered.posted_.push_back(posted);
  }
  end_run(objects.size());
  return failure;
}

}  // namespace kvferry::rdma
