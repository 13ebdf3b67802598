// SPDX-License-Identifier: Apache-2.0
#include "stream.hpp"

#include <algorithm>

namespace bench {

void Stream::begin_run(const Limit& limit) {
  // Room for what a second or two brings, so that growing isn't timed.
  constexpr std::size_t usual = std::size_t{1} << 17;
  limit_ = limit;
  latencies_.clear();
  latencies_.reserve(std::min<std::uint64_t>(limit.batches, usual));
  submissions_.clear();
  submissions_.reserve(std::min<std::uint64_t>(limit.batches, usual));
  ended_ = Clock::now();
}

}  // namespace bench
