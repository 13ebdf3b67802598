// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "job.hpp"

namespace bench {

/// Maps pages to pages: both sides' pages in random order (or all in order), the same at both. The n-th page of the one
/// order goes to the n-th page of the other. Each stream has a range of whole batches and goes round in it.
class PageMap {
 public:
  explicit PageMap(const Job& job);

  /// Pages that a batch has in the initiator's region.
  [[nodiscard]] std::span<const std::uint64_t> initiator_pages(std::size_t stream, std::uint64_t batch) const {
    return part_of(initiator_, stream, batch);
  }
  /// The same in the target's, which has a part for each peer: relative to that of the stream's peer.
  [[nodiscard]] std::span<const std::uint64_t> target_pages(std::size_t stream, std::uint64_t batch) const {
    return part_of(target_, stream, batch);
  }

  [[nodiscard]] std::size_t batches_per_stream() const { return batches_per_stream_; }
  [[nodiscard]] std::size_t peer_of(std::size_t stream) const { return stream / streams_per_peer_; }
  [[nodiscard]] std::size_t pages_per_peer() const { return streams_per_peer_ * batches_per_stream_ * batch_; }
  /// Pages of each side's region.
  [[nodiscard]] std::size_t pages() const { return initiator_.size(); }
  [[nodiscard]] std::size_t page_size() const { return page_size_; }

 private:
  [[nodiscard]] std::span<const std::uint64_t> part_of(const std::vector<std::uint64_t>& pages, std::size_t stream,
                                                       std::uint64_t batch) const {
    const auto round = static_cast<std::size_t>(batch % batches_per_stream_);
    return std::span(pages).subspan((stream * batches_per_stream_ + round) * batch_, batch_);
  }

  std::size_t page_size_;
  std::size_t batch_;
  std::size_t streams_per_peer_;
  std::size_t batches_per_stream_;
  std::vector<std::uint64_t> initiator_;
  std::vector<std::uint64_t> target_;
};

}  // namespace bench
