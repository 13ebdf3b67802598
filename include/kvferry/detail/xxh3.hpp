// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The XXH3-64 (seed 0) of these pieces of memory, one behind the other, by the widest vectors that this CPU has and the
/// library is compiled for.
[[nodiscard]] KVFERRY_EXPORT std::uint64_t xxh3_of(std::span<const iovec> pieces) noexcept;

}  // namespace kvferry
