// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A part of the descriptors that this process may have, as RLIMIT_NOFILE is at this moment: a program may raise it while it
/// has channels.
[[nodiscard]] inline std::size_t share_of_descriptors(rlim_t divisor, rlim_t least, rlim_t most) noexcept {
  rlimit descriptors{};
  ::getrlimit(RLIMIT_NOFILE, &descriptors);
  return static_cast<std::size_t>(std::clamp<rlim_t>(descriptors.rlim_cur / divisor, least, most));
}

}  // namespace kvferry
