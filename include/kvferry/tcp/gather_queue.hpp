// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <kvferry/kit/fifo.hpp>
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Bytes on their way out of a connection: headers that it owns and payload that it only points to, in the order in
/// which the kernel is to gather them.
class KVFERRY_EXPORT GatherQueue {
 public:
  /// Appends a header and its descriptors, copied.
  void add_header(const FrameHeader& header, std::span<const Descriptor> descriptors = {});
  /// Appends bytes, copied.
  void add_copy(std::span<const std::byte> bytes);
  /// Appends bytes that stay where they are until they are sent.
  void add_view(const std::byte* data, std::size_t size);
  /// The same of several pieces, none of which is empty.
  void add_views(std::span<const iovec> pieces);
  /// The same of pieces that `visit` calls what it is given with, about `count` of them; those that are empty are left out.
  template <class Visit>
  void add_views(Visit visit, std::size_t count) {
    if (pieces_.capacity() - pieces_.size() < count) {
      pieces_.reserve(std::max(pieces_.size() + count, 2 * pieces_.capacity()));
    }
    std::uint64_t added = added_;
    visit([&](const std::byte* data, std::size_t size) {
      if (size != 0) {
        pieces_.push_back({const_cast<std::byte*>(data), size});
        added += size;
      }
    });
    added_ = added;
  }
  /// Marks the beginning of a frame. Until `pin`, what is added belongs to it.
  void begin_frame() { frame_begin_ = {added_, piece_base_ + pieces_.size()}; }
  /// Marks the end of a frame that points into `owner`'s buffers; `consume` reports it once it is sent.
  void pin(std::uint64_t owner) { pins_.push_back({frame_begin_, {added_, piece_base_ + pieces_.size()}, owner}); }
  /// Ends a frame by a trailer that stays where it is.
  void add_trailer(const FrameTrailer& trailer) {
    add_view(reinterpret_cast<const std::byte*>(&trailer), sizeof(trailer));
  }
  /// Called if the bytes at the front can't be read: sends zeroes in place of the rest of their frame, and `trailer`
  /// behind them. @return the frame's owner; nothing if these bytes aren't an owner's buffers.
  std::optional<std::uint64_t> spoil_front(const FrameTrailer& trailer);
  /// Takes out the frames of `owner` of which nothing has been sent. @return their number.
  std::size_t drop_unbegun(std::uint64_t owner);

  [[nodiscard]] std::size_t bytes() const noexcept { return added_ - sent_; }
  [[nodiscard]] bool empty() const noexcept { return added_ == sent_; }

  /// Picks those of `pieces` (some of `front`'s) that don't lie in this queue's own memory, and so may be missing.
  /// @return their number.
  std::size_t foreign(std::span<const iovec> pieces, std::span<iovec> out) const;

  /// The next bytes to send, at most `max_bytes` in at most `out.size()` pieces. @return the number of pieces.
  std::size_t front(std::span<iovec> out, std::size_t max_bytes) const;

  /// Drops `count` bytes from the front and calls `unpinned(owner)` for each pin that lies before them.
  template <class Function>
  void consume(std::size_t count, Function unpinned) {
    drop(count);
    while (!pins_.empty() && pins_.front().end.byte <= sent_) {
      const auto owner = pins_.front().owner;
      pins_.pop_front();
      unpinned(owner);
    }
  }

  /// Forgets everything, pins included.
  void clear();

 private:
  /// Counted from the first byte and piece ever added.
  struct Position {
    std::uint64_t byte = 0;
    std::uint64_t piece = 0;
  };
  struct Pin {
    Position begin;
    Position end;
    std::uint64_t owner = 0;
  };
  struct Copy {
    std::uint64_t end = 0;
    std::vector<std::byte> bytes;
  };

  [[nodiscard]] std::vector<std::byte> spare();
  void add_owned(std::vector<std::byte> bytes);
  void drop(std::size_t count);

  std::vector<iovec> pieces_;
  std::uint64_t piece_base_ = 0;  ///< Pieces that were dropped from the front of `pieces_`.
  Position frame_begin_;
  std::size_t head_ = 0;  ///< First piece that isn't wholly sent.
  std::uint64_t added_ = 0;
  std::uint64_t sent_ = 0;
  kit::Fifo<Pin> pins_;
  kit::Fifo<Copy> copies_;
  std::vector<std::vector<std::byte>> spares_;
};

}  // namespace kvferry::tcp
