// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Whether two blocks of memory are equal. In one call, as sanitizers look at each access of a loop, which == of vectors is.
[[nodiscard]] inline bool same_bytes(std::span<const std::byte> one, std::span<const std::byte> other) {
  return one.size() == other.size() && (one.empty() || std::memcmp(one.data(), other.data(), one.size()) == 0);
}

}  // namespace kvferry::testing
