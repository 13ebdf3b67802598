// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include <kvferry/transfer_spec.hpp>

#include "core/kit/striped_operation.hpp"
#include "frame.hpp"

namespace kvferry::tcp {

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
    while (object_ != end_ && chunk.count < max_chunk_objects && (chunk.bytes < max_chunk_bytes)) {
      const std::size_t length = std::min(travelling_size(object_) - offset_, max_chunk_bytes - chunk.bytes);
      chunk.bytes += length;
      chunk.last_end = offset_ + length;
      ++chunk.count;
      if (chunk.last_end == travelling_size(object_)) {
        ++object_;
        offset_ = 0;
      } else {
        offset_ = chunk.last_end;
      }
    }
    return chunk;
  }

  template <class Function>
  void for_each_piece(const Chunk& chunk, Function function) const {
    for (std::size_t i = 0; i < chunk.count; ++i) {
      const std::size_t object = chunk.first + i;
      const std::size_t begin = i == 0 ? chunk.first_offset : 0;
      const std::size_t end = i + 1 == chunk.count ? chunk.last_end : travelling_size(object);
      function(Piece{object, begin, end - begin, is_refused(object), end == travelling_size(object)});
    }
  }

 private:
  [[nodiscard]] bool is_refused(std::size_t object) const { return !refused_.empty() && refused_[object]; }
  [[nodiscard]] std::size_t travelling_size(std::size_t object) const {
    return is_refused(object) ? 0 : objects_[object].size();
  }

  std::span<const MutableBuffer> objects_;
  std::vector<bool> refused_;
  std::size_t object_ = 0;
  std::size_t offset_ = 0;
  std::size_t end_ = 0;
};

}  // namespace kvferry::tcp
