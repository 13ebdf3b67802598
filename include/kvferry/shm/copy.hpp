// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The kind of a copy's stores.
enum class Stores {
  cached,     ///< The copied bytes are likely to be used next.
  streaming,  ///< Past the caches: for large copies, which would displace other data.
};

/// Copies bytes that don't overlap. A thread that is told of the end sees all of them.
void copy(std::byte* to, const std::byte* from, std::size_t bytes, Stores stores) noexcept;

}  // namespace kvferry::shm
