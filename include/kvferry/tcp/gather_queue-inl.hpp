// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/gather_queue.hpp>

#include <algorithm>
#include <array>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Buffers for headers are used again rather than allocated for each frame; few, and small, so that an idle connection
/// holds little.
inline constexpr std::size_t max_spares = 4;
inline constexpr std::size_t max_spare_bytes = 4096;
inline constexpr std::size_t max_spare_pieces = 4096;

/// Sent in place of what can't be read.
KVFERRY_INLINE std::array<std::byte, std::size_t{64} << 10> filler;

}  // namespace internal

KVFERRY_INLINE std::vector<std::byte> GatherQueue::spare() {
  if (spares_.empty()) {
    return {};
  }
  std::vector<std::byte> bytes = std::move(spares_.back());
  spares_.pop_back();
  bytes.clear();
  return bytes;
}

KVFERRY_INLINE void GatherQueue::add_header(const FrameHeader& header, std::span<const Descriptor> descriptors) {
  std::vector<std::byte> bytes = spare();
  const auto header_bytes = std::as_bytes(std::span(&header, 1));
  const auto descriptor_bytes = std::as_bytes(descriptors);
  bytes.reserve(header_bytes.size() + descriptor_bytes.size());
  bytes.insert(bytes.end(), header_bytes.begin(), header_bytes.end());
  bytes.insert(bytes.end(), descriptor_bytes.begin(), descriptor_bytes.end());
  add_owned(std::move(bytes));
}

KVFERRY_INLINE void GatherQueue::add_copy(std::span<const std::byte> bytes) {
  if (!bytes.empty()) {
    add_owned({bytes.begin(), bytes.end()});
  }
}

KVFERRY_INLINE void GatherQueue::add_owned(std::vector<std::byte> bytes) {
  add_view(bytes.data(), bytes.size());
  copies_.push_back({added_, std::move(bytes)});
}

KVFERRY_INLINE void GatherQueue::add_view(const std::byte* data, std::size_t size) {
  if (size != 0) {
    pieces_.push_back({const_cast<std::byte*>(data), size});
    added_ += size;
  }
}

KVFERRY_INLINE void GatherQueue::add_views(std::span<const iovec> pieces) {
  pieces_.insert(pieces_.end(), pieces.begin(), pieces.end());
  for (const iovec& piece : pieces) {
    added_ += piece.iov_len;
  }
}

KVFERRY_INLINE std::size_t GatherQueue::front(std::span<iovec> out, std::size_t max_bytes) const {
  std::size_t count = 0;
  for (std::size_t i = head_; i < pieces_.size() && count < out.size() && max_bytes != 0; ++i) {
    out[count] = pieces_[i];
    out[count].iov_len = std::min(out[count].iov_len, max_bytes);
    max_bytes -= out[count].iov_len;
    ++count;
  }
  return count;
}

KVFERRY_INLINE std::size_t GatherQueue::foreign(std::span<const iovec> pieces, std::span<iovec> out) const {
  std::size_t count = 0;
  for (const iovec& piece : pieces) {
    const auto begin = reinterpret_cast<std::uintptr_t>(piece.iov_base);
    const bool own = std::ranges::any_of(copies_, [&](const Copy& copy) {
      return begin - reinterpret_cast<std::uintptr_t>(copy.bytes.data()) < copy.bytes.size();
    });
    if (!own) {
      out[count++] = piece;
    }
  }
  return count;
}

KVFERRY_INLINE void GatherQueue::drop(std::size_t count) {
  sent_ += count;
  if (sent_ == added_) {
    head_ = pieces_.size();
    count = 0;
  }
  while (count != 0) {
    iovec& piece = pieces_[head_];
    const std::size_t part = std::min(piece.iov_len, count);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + part;
    piece.iov_len -= part;
    count -= part;
    if (piece.iov_len == 0) {
      ++head_;
    }
  }
  // Moving what is left costs at most what was sent since the last time.
  if (head_ * 2 >= pieces_.size()) {
    pieces_.erase(pieces_.begin(), pieces_.begin() + static_cast<std::ptrdiff_t>(head_));
    piece_base_ += head_;
    head_ = 0;
    if (pieces_.empty() && pieces_.capacity() > max_spare_pieces) {
      pieces_.shrink_to_fit();
    }
  }
  while (!copies_.empty() && copies_.front().end <= sent_) {
    if (spares_.size() < max_spares && copies_.front().bytes.capacity() <= max_spare_bytes) {
      spares_.push_back(std::move(copies_.front().bytes));
    }
    copies_.pop_front();
  }
}

KVFERRY_INLINE std::optional<std::uint64_t> GatherQueue::spoil_front(const FrameTrailer& trailer) {
  if (pins_.empty() || pins_.front().begin.byte >= sent_) {
    return std::nullopt;
  }
  Pin& front = pins_.front();
  const auto first = pieces_.begin() + static_cast<std::ptrdiff_t>(head_);
  const auto last = pieces_.begin() + static_cast<std::ptrdiff_t>(front.end.piece - piece_base_ - 1);
  std::size_t left = 0;
  for (auto piece = first; piece != last; ++piece) {
    left += piece->iov_len;
  }
  last->iov_base = const_cast<FrameTrailer*>(&trailer);
  std::vector<iovec> filling;
  while (left != 0) {
    filling.push_back({filler.data(), std::min(left, filler.size())});
    left -= filling.back().iov_len;
  }
  const auto removed = static_cast<std::uint64_t>(last - first);
  pieces_.insert(pieces_.erase(first, last), filling.begin(), filling.end());
  front.end.piece += filling.size() - removed;
  for (auto later = std::next(pins_.begin()); later != pins_.end(); ++later) {
    later->begin.piece += filling.size() - removed;
    later->end.piece += filling.size() - removed;
  }
  return front.owner;
}

KVFERRY_INLINE std::size_t GatherQueue::drop_unbegun(std::uint64_t owner) {
  std::size_t dropped = 0;
  for (auto pin = pins_.begin(); pin != pins_.end();) {
    if (pin->owner != owner || pin->begin.byte < sent_) {
      ++pin;
      continue;
    }
    const std::uint64_t bytes = pin->end.byte - pin->begin.byte;
    const std::uint64_t pieces = pin->end.piece - pin->begin.piece;
    const auto first = pieces_.begin() + static_cast<std::ptrdiff_t>(pin->begin.piece - piece_base_);
    pieces_.erase(first, first + static_cast<std::ptrdiff_t>(pieces));
    copies_.erase_if([&](const Copy& copy) { return copy.end > pin->begin.byte && copy.end <= pin->end.byte; });
    for (Copy& copy : copies_) {
      copy.end -= copy.end > pin->begin.byte ? bytes : 0;
    }
    pin = pins_.erase(pin);
    for (auto later = pin; later != pins_.end(); ++later) {
      later->begin = {later->begin.byte - bytes, later->begin.piece - pieces};
      later->end = {later->end.byte - bytes, later->end.piece - pieces};
    }
    added_ -= bytes;
    ++dropped;
  }
  return dropped;
}

/// Without another queue in its place: memory may be used up.
KVFERRY_INLINE void GatherQueue::clear() {
  pieces_ = std::vector<iovec>();
  piece_base_ = 0;
  frame_begin_ = {};
  head_ = 0;
  added_ = 0;
  sent_ = 0;
  pins_.clear();
  copies_.clear();
  spares_ = std::vector<std::vector<std::byte>>();
}

}  // namespace kvferry::tcp
