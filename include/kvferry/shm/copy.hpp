// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The kind of a copy's stores.
enum class Stores : std::uint8_t {
  cached,     ///< The copied bytes are likely to be used next.
  streaming,  ///< Past the caches: for large copies, which would displace other data.
};

/// Copies the memory of `from` to that of `to`, which has as many bytes and doesn't overlap it. A thread that is told of the
/// end sees all of them.
void copy(std::span<const iovec> from, std::span<const iovec> to, Stores stores) noexcept;

}  // namespace kvferry::shm
