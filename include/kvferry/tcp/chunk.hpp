// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <kvferry/transfer_spec.hpp>

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

/// A contiguous piece of an object.
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
  ChunkCursor(std::span<const MutableBuffer> objects, ObjectRange range)
      : objects_(objects), object_(range.begin), end_(range.end) {}

  /// Objects none of whose bytes travel.
  void refuse(std::vector<bool> refused) { refused_ = std::move(refused); }

  [[nodiscard]] bool done() const noexcept { return object_ == end_; }

  [[nodiscard]] Chunk next() {
    Chunk chunk{object_, offset_, 0, 0, 0};
    const bool any_refused = !refused_.empty();
    std::size_t object = object_;
    std::size_t offset = offset_;
    while (object != end_ && chunk.count < sent_chunk_objects && chunk.bytes < max_chunk_bytes) {
      const std::size_t size = any_refused && refused_[object] ? 0 : objects_[object].size();
      const std::size_t length = std::min(size - offset, max_chunk_bytes - chunk.bytes);
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

  template <class Function>
  void for_each_piece(const Chunk& chunk, Function function) const {
    // Both read once: for all that the compiler knows, `function` may change them.
    const MutableBuffer* const objects = objects_.data();
    const bool any_refused = !refused_.empty();
    std::size_t begin = chunk.first_offset;
    for (std::size_t object = chunk.first, left = chunk.count; left != 0; ++object, --left) {
      const bool refused = any_refused && refused_[object];
      const std::size_t size = refused ? 0 : objects[object].size();
      const std::size_t end = left == 1 ? chunk.last_end : size;
      function(Piece{object, begin, end - begin, refused, end == size});
      begin = 0;
    }
  }

 private:
  std::span<const MutableBuffer> objects_;
  std::vector<bool> refused_;
  std::size_t object_ = 0;
  std::size_t offset_ = 0;
  std::size_t end_ = 0;
};

}  // namespace kvferry::tcp
