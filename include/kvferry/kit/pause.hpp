// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PAUSE_HPP
#define KVFERRY_KIT_PAUSE_HPP

#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Sleeps until one of these ends.
inline void wait_for(std::span<const Link::Pause> pauses) {
  std::vector<pollfd> descriptors;
  auto until = Clock::time_point::max();
  for (const Link::Pause& pause : pauses) {
    until = std::min(until, pause.until);
    for (const int descriptor : pause.descriptors) {
      descriptors.push_back({descriptor, POLLIN, 0});
    }
    for (const int descriptor : pause.writing) {
      descriptors.push_back({descriptor, POLLOUT, 0});
    }
  }
  const auto rest = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now());
  const auto timeout = static_cast<int>(std::clamp<std::int64_t>(rest.count(), 0, 1000));
  (void)::poll(descriptors.data(), descriptors.size(), timeout);
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PAUSE_HPP
