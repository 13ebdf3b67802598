// SPDX-License-Identifier: Apache-2.0
#include "checksums.hpp"

#include <sys/mman.h>
#include <unistd.h>

// All of it in this file: there is no library to link.
#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#include <xxhash.h>
#undef XXH_INLINE_ALL
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <array>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/kit/overlap.hpp>
#include "message.hpp"
#include "slice_table.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// As many pieces as a call takes (IOV_MAX).
constexpr std::size_t looked_at_once = 1024;
/// None is smaller.
constexpr std::size_t least_page = 4096;

}  // namespace

std::uint64_t sum_of(std::span<const iovec> pieces) noexcept {
  if (pieces.size() == 1) {
    return XXH3_64bits(pieces[0].iov_base, pieces[0].iov_len);
  }
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (const iovec& piece : pieces) {
    XXH3_64bits_update(&state, piece.iov_base, piece.iov_len);
  }
  return XXH3_64bits_digest(&state);
}

std::shared_ptr<const MemoryLook> MemoryLook::shared() {
  static std::mutex mutex;
  static std::weak_ptr<const MemoryLook> one;
  const std::lock_guard lock(mutex);
  auto look = one.lock();
  if (!look) {
    look = std::make_shared<const MemoryLook>();
    one = look;
  }
  return look;
}

MemoryLook::MemoryLook() : descriptor_(::memfd_create("kvferry", MFD_CLOEXEC)) {
  if (descriptor_ < 0) {
    throw TransferError(std::error_code(errno, std::system_category()), "memfd_create");
  }
}

MemoryLook::~MemoryLook() { ::close(descriptor_); }

bool MemoryLook::can_read(std::span<const iovec> pieces) const noexcept {
  std::array<iovec, looked_at_once> bytes;
  std::size_t count = 0;
  const auto look = [&] {
    const auto read = ::pwritev(descriptor_, bytes.data(), static_cast<int>(count), 0);
    return read == static_cast<ssize_t>(std::exchange(count, 0));
  };
  for (const iovec& piece : pieces) {
    auto* byte = static_cast<std::byte*>(piece.iov_base);
    for (std::size_t left = piece.iov_len; left != 0;) {
      bytes[count++] = {byte, 1};
      if (count == bytes.size() && !look()) {
        return false;
      }
      const std::size_t on_page = std::min<std::size_t>(left, least_page - address_of(byte) % least_page);
      byte += on_page;
      left -= on_page;
    }
  }
  return count == 0 || look();
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

std::vector<bool> landing_on_others(const TransferRequest& request) {
  if (!request.one_sided() || !kit::lands_on_itself(request)) {
    return {};
  }
  struct Piece {
    std::uint64_t region;
    std::uint64_t begin;
    std::uint64_t end;
    std::size_t object;
  };
  std::vector<Piece> pieces;
  const kit::LocalBytes objects(request);
  for (std::size_t i = 0; i < objects.count(); ++i) {
    const auto add = [&](std::uint64_t region, std::uint64_t begin, std::uint64_t length) {
      pieces.push_back({region, begin, begin + length, i});
    };
    const std::size_t size = objects.size(i);
    if (request.kind == TransferKind::read) {
      objects.for_each_piece(i, 0, size,
                             [&](const std::byte* data, std::size_t length) { add(0, address_of(data), length); });
    } else if (request.remote_ranges.empty()) {
      // Pages as such: an object on a page that another one has counts as landing there, however long both are.
      add(request.remote_indexes[i], 0, size);
    } else {
      const RemoteRange& range = request.remote_ranges[i];
      kit::Blocks::of(range).for_each_piece(0, size, [&](std::uint64_t position, std::uint64_t length) {
        add(range.region, range.offset + position, length);
      });
    }
  }
  std::erase_if(pieces, [](const Piece& piece) { return piece.begin == piece.end; });
  std::ranges::sort(pieces, [](const Piece& a, const Piece& b) {
    return std::pair(a.region, a.begin) < std::pair(b.region, b.begin);
  });
  std::vector<bool> found(objects.count());
  const Piece* longest = nullptr;  // of those so far, the one that reaches furthest
  for (const Piece& piece : pieces) {
    const bool beside = longest != nullptr && piece.region == longest->region;
    if (beside && piece.begin < longest->end) {
      found[piece.object] = found[longest->object] = true;
    }
    if (!beside || piece.end > longest->end) {
      longest = &piece;
    }
  }
  return found;
}

}  // namespace kvferry::rdma
