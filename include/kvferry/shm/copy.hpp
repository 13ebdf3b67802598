// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// Which stores a copy is made with.
enum class Stores {
  cached,     ///< What is copied is likely to be used next.
  streaming,  ///< Past the caches: more than they had better be filled with.
};

/// Copies bytes that don't overlap. Afterwards all of them are there for whoever is told so.
void copy(std::byte* to, const std::byte* from, std::size_t bytes, Stores stores) noexcept;

}  // namespace kvferry::shm
