// SPDX-License-Identifier: Apache-2.0
#include "page_map.hpp"

#include <algorithm>
#include <numeric>
#include <random>

namespace bench {
namespace {

void append_pages(std::vector<std::uint64_t>& pages, std::size_t count, bool shuffled, std::mt19937_64& random) {
  const auto first = static_cast<std::ptrdiff_t>(pages.size());
  pages.resize(pages.size() + count);
  std::iota(pages.begin() + first, pages.end(), std::uint64_t{0});
  if (shuffled) {
    std::shuffle(pages.begin() + first, pages.end(), random);
  }
}

}  // namespace

PageMap::PageMap(const Job& job)
    : page_size_(job.page),
      batch_(job.batch),
      streams_per_peer_(job.streams_per_peer),
      batches_per_stream_(std::max<std::size_t>(1, job.region / job.batch_bytes() / job.streams())) {
  std::mt19937_64 random(20240229);
  append_pages(initiator_, job.peers * pages_per_peer(), !job.adjacent, random);
  target_.reserve(initiator_.size());
  for (std::size_t peer = 0; peer < job.peers; ++peer) {
    append_pages(target_, pages_per_peer(), !job.adjacent, random);
  }
}

}  // namespace bench
