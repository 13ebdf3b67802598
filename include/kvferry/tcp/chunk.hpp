// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <kvferry/transfer_spec.hpp>

#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

using kit::ObjectRange;

/// The part of a batch that travels in one frame: `[first, first + count)` of its objects, the first one from
/// `first_offset` on, the last one up to `last_end`.
struct Chunk {
  std::size_t first = 0;
  std::size_t first_offset = 0;
  std::size_t count = 0;
  std::size_t last_end = 0;
  std::size_t bytes = 0;
};

/// A contiguous part of an object's bytes.
struct Piece {
  std::size_t object = 0;
  std::size_t offset = 0;
  std::size_t length = 0;
  bool refused = false;    ///< None of the object's bytes travel.
  bool completes = false;  ///< The object ends with this piece.
};

/// Cuts a batch into chunks.
class ChunkCursor {
 public:
  ChunkCursor() = default;
  /// `strides` and `ranges` are as in `TransferRequest`; what they refer to outlives this.
  ChunkCursor(std::span<const MutableBuffer> objects, ObjectRange range, std::span<const LocalStride> strides = {},
              std::span<const RemoteRange> ranges = {})
      : local_(objects, strides), ranges_(ranges), object_(range.begin), end_(range.end) {
    const auto has_blocks = [](const RemoteRange& remote) { return remote.count != 1; };
    const auto own = ranges.empty() ? ranges : ranges.subspan(range.begin, range.end - range.begin);
    in_blocks_ = !strides.empty() || std::ranges::any_of(own, has_blocks);
  }
  ChunkCursor(const TransferRequest& request, ObjectRange range)
      : ChunkCursor(request.objects, range, request.local_strides, request.remote_ranges) {}

  /// Objects none of whose bytes travel.
  void refuse(std::vector<bool> refused) { refused_ = std::move(refused); }

  [[nodiscard]] bool none_refused() const noexcept { return refused_.empty(); }

  [[nodiscard]] bool done() const noexcept { return object_ == end_; }
  [[nodiscard]] const kit::LocalBytes& local() const noexcept { return local_; }

  /// @param most bytes of the chunk; 1 to `max_chunk_bytes`.
  [[nodiscard]] Chunk next(std::size_t most = max_chunk_bytes) {
    return in_blocks_ ? next_of_blocks(most) : next_of_buffers(most);
  }

  template <class Function>
  void for_each_piece(const Chunk& chunk, Function function) const {
    if (local_.strided()) {
      visit(chunk, function, [&](std::size_t object) { return local_.size(object); });
    } else {
      // Read once: for all that the compiler knows, `function` may change it.
      visit(chunk, function,
            [objects = local_.objects().data()](std::size_t object) { return objects[object].size(); });
    }
  }

 private:
  /// Where each object is one piece of memory on either side.
  [[nodiscard]] Chunk next_of_buffers(std::size_t most) {
    const MutableBuffer* const objects = local_.objects().data();
    Chunk chunk{object_, offset_, 0, 0, 0};
    const bool any_refused = !refused_.empty();
    std::size_t object = object_;
    std::size_t offset = offset_;
    while (object != end_ && chunk.count < sent_chunk_objects && chunk.bytes < most) {
      const std::size_t size = any_refused && refused_[object] ? 0 : objects[object].size();
      const std::size_t length = std::min(size - offset, most - chunk.bytes);
      chunk.bytes += length;
      chunk.last_end = offset + length;
      ++chunk.count;
      if (chunk.last_end == size) {
        ++object;
        offset = 0;
      } else {
        offset = chunk.last_end;
      }
    }
    object_ = object;
    offset_ = offset;
    return chunk;
  }

  /// Bounded by the pieces of memory on either side as well. Nothing is refused: only sends have that.
  [[nodiscard]] Chunk next_of_blocks(std::size_t most) {
    Chunk chunk{object_, offset_, 0, 0, 0};
    std::size_t local_left = sent_chunk_objects;
    std::size_t remote_left = sent_chunk_objects;
    while (object_ != end_ && local_left != 0 && remote_left != 0 && chunk.bytes < most) {
      const kit::Blocks local = local_.blocks(object_);
      // A page is one piece.
      const kit::Blocks remote =
          ranges_.empty() ? kit::Blocks{local.bytes, local.bytes, local.bytes} : kit::Blocks::of(ranges_[object_]);
      const std::uint64_t length =
          std::min({std::uint64_t{most - chunk.bytes}, local.bytes_of_pieces(offset_, local_left),
                    remote.bytes_of_pieces(offset_, remote_left)});
      local_left -= local.pieces(offset_, length);
      remote_left -= remote.pieces(offset_, length);
      chunk.bytes += static_cast<std::size_t>(length);
      offset_ += static_cast<std::size_t>(length);
      chunk.last_end = offset_;
      ++chunk.count;
      if (offset_ == local.bytes) {
        ++object_;
        offset_ = 0;
      }
    }
    return chunk;
  }

  template <class Function, class SizeOf>
  void visit(const Chunk& chunk, Function& function, SizeOf size_of) const {
    const bool any_refused = !refused_.empty();
    std::size_t begin = chunk.first_offset;
    for (std::size_t object = chunk.first, left = chunk.count; left != 0; ++object, --left) {
      const bool refused = any_refused && refused_[object];
      const std::size_t size = refused ? 0 : size_of(object);
      const std::size_t end = left == 1 ? chunk.last_end : size;
      function(Piece{object, begin, end - begin, refused, end == size});
      begin = 0;
    }
  }

  kit::LocalBytes local_;
  std::span<const RemoteRange> ranges_;
  std::vector<bool> refused_;
  bool in_blocks_ = false;
  std::size_t object_ = 0;
  std::size_t offset_ = 0;
  std::size_t end_ = 0;
};

}  // namespace kvferry::tcp
