// SPDX-License-Identifier: Apache-2.0
#include "checksums.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <system_error>
#include <utility>

#include <kvferry/detail/readable_memory.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/overlap.hpp>
#include "message.hpp"
#include "slice_table.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// Blocks of a batch that are told apart, on its caller's thread.
constexpr std::uint64_t most_looked_at = 32'768;

}  // namespace

MemoryLook::MemoryLook() : descriptor_(::memfd_create("kvferry", MFD_CLOEXEC)) {
  if (descriptor_ < 0) {
    throw TransferError(std::error_code(errno, std::system_category()), "memfd_create");
  }
}

MemoryLook::~MemoryLook() { ::close(descriptor_); }

bool MemoryLook::can_read(std::span<const iovec> pieces) const noexcept {
  return kernel_can_read(pieces, [this](std::span<const iovec> bytes) {
    return ::pwritev(descriptor_, bytes.data(), static_cast<int>(bytes.size()), 0);
  });
}

ObjectPart part_of(const RemoteRange& range, std::uint64_t offset) {
  const kit::Blocks blocks = kit::Blocks::of(range);
  const kit::Blocks::Place place = blocks.place(offset);
  const std::uint64_t begin = range.offset + place.position;
  if (place.available < blocks.size || blocks.size > max_part_bytes || blocks.size == blocks.bytes) {
    const std::uint64_t length = std::min<std::uint64_t>(place.available, max_part_bytes);
    return {length, RemoteRange::contiguous(range.region, begin, length)};
  }
  const std::uint64_t count =
      std::min({max_part_bytes / blocks.size, (blocks.bytes - offset) / blocks.size, max_part_blocks});
  return {count * blocks.size, RemoteRange::strided(range.region, begin, blocks.size, blocks.stride, count)};
}

std::vector<bool> landing_on_others(const TransferRequest& request, const RegionAddress& address_of_region) {
  if (!request.one_sided()) {
    return {};
  }
  const kit::LocalBytes objects(request);
  const bool is_read = request.kind == TransferKind::read;
  const bool pages = !is_read && request.remote_ranges.empty();
  if (pages && !kit::lands_on_itself(request)) {
    return {};
  }
  struct Extent {
    std::uint64_t begin;
    std::uint64_t end;
    std::size_t object;
  };
  const auto blocks_of = [&](std::size_t object) {
    return is_read ? objects.blocks(object) : kit::Blocks::of(request.remote_ranges[object]);
  };
  std::vector<Extent> extents;
  bool rising = true;
  for (std::size_t i = 0; i < objects.count(); ++i) {
    Extent extent{0, 0, i};
    if (pages) {
      // Pages as such: an object on a page that another one has counts as landing there, however long both are.
      extent = {request.remote_indexes[i], request.remote_indexes[i] + std::min<std::uint64_t>(objects.size(i), 1), i};
    } else if (const kit::Blocks blocks = blocks_of(i); blocks.bytes != 0) {
      extent.begin = is_read ? address_of(request.objects[i].data())
                             : address_of_region(request.remote_ranges[i].region) + request.remote_ranges[i].offset;
      extent.end = extent.begin + (blocks.bytes / blocks.size - 1) * blocks.stride + blocks.size;
    }
    if (extent.begin != extent.end) {
      rising = rising && (extents.empty() || extents.back().end <= extent.begin);
      extents.push_back(extent);
    }
  }
  if (rising) {
    return {};
  }
  std::vector<bool> found(objects.count());
  /// Marks the objects of those that overlap with one of another object.
  const auto mark = [&found](std::vector<Extent>& of) {
    std::ranges::sort(of, {}, &Extent::begin);
    const Extent* longest = nullptr;  // of those so far, the one that reaches furthest
    for (const Extent& extent : of) {
      if (longest != nullptr && extent.begin < longest->end && extent.object != longest->object) {
        found[extent.object] = found[longest->object] = true;
      }
      if (longest == nullptr || extent.end > longest->end) {
        longest = &extent;
      }
    }
  };
  mark(extents);
  // The blocks of some may only interleave: a closer look at them, as long as it takes no time to speak of.
  std::uint64_t pieces = 0;
  bool strided = false;
  for (std::size_t i = 0; i < found.size() && !pages; ++i) {
    if (found[i]) {
      const kit::Blocks blocks = blocks_of(i);
      strided = strided || blocks.size != blocks.bytes;
      pieces += blocks.pieces(0, blocks.bytes);
    }
  }
  if (!strided || pieces > most_looked_at) {
    return found;
  }
  std::vector<Extent> blocks;
  blocks.reserve(static_cast<std::size_t>(pieces));
  for (const Extent& extent : extents) {
    if (found[extent.object]) {
      const kit::Blocks of = blocks_of(extent.object);
      of.for_each_piece(0, of.bytes, [&](std::uint64_t position, std::uint64_t length) {
        blocks.push_back({extent.begin + position, extent.begin + position + length, extent.object});
      });
    }
  }
  found.assign(found.size(), false);
  mark(blocks);
  return found;
}

bool lands_on_itself(const TransferRequest& request, const RegionAddress& address_of_region) {
  if (kit::lands_on_itself(request)) {
    return true;
  }
  const bool of_several =
      request.kind == TransferKind::write &&
      std::ranges::adjacent_find(request.remote_ranges, std::ranges::not_equal_to(), &RemoteRange::region) !=
          request.remote_ranges.end();
  return of_several && std::ranges::any_of(landing_on_others(request, address_of_region), std::identity());
}

}  // namespace kvferry::rdma
