// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/transfer_spec.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/program.hpp"

namespace bench {

inline constexpr const char* initiator_id = "initiator";

[[nodiscard]] inline std::string peer_id(std::size_t peer) { return "target-" + std::to_string(peer); }

/// Sends of a stream take turns at this many tags, which are no other stream's. So their receives, which are posted ahead,
/// need not be posted in order.
[[nodiscard]] inline std::uint64_t tag_of(std::size_t stream, std::uint64_t batch, std::size_t receives_ahead) {
  return stream * receives_ahead + batch % receives_ahead;
}

/// The objects of each of a stream's batches, made before anything is timed.
template <class Buffer>
class StreamObjects {
 public:
  StreamObjects(const Setup& setup, std::size_t stream, bool at_target) {
    const std::uint64_t first = at_target ? setup.map.peer_of(stream) * setup.map.pages_per_peer() : 0;
    for (std::size_t batch = 0; batch < setup.map.batches_per_stream(); ++batch) {
      const auto pages = at_target ? setup.map.target_pages(stream, batch) : setup.map.initiator_pages(stream, batch);
      auto& objects = batches_.emplace_back();
      objects.reserve(pages.size());
      for (const auto page : pages) {
        objects.emplace_back(setup.region.page(first + page));
      }
    }
  }

  [[nodiscard]] const std::vector<Buffer>& operator[](std::uint64_t batch) const {
    return batches_[static_cast<std::size_t>(batch % batches_.size())];
  }

 private:
  std::vector<std::vector<Buffer>> batches_;
};

}  // namespace bench
