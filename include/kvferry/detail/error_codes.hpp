// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <system_error>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Whether a number that came from elsewhere is one of `errc`'s.
[[nodiscard]] bool is_errc(std::int64_t value) noexcept;

/// The same code with this copy's category, where another copy of kvferry, or of Asio, in this process has made it: a
/// plugin's, say. Any other code as it is.
[[nodiscard]] std::error_code of_this_copy(const std::error_code& code) noexcept;

/// Empty if it is none of `errc`'s.
[[nodiscard]] std::string_view errc_name(int value) noexcept;

}  // namespace kvferry
