// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Whether a number that came from elsewhere is one of `errc`'s.
[[nodiscard]] bool is_errc(std::int64_t value) noexcept;

/// Empty if it is none of `errc`'s.
[[nodiscard]] std::string_view errc_name(int value) noexcept;

}  // namespace kvferry
