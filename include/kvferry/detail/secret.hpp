// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

inline constexpr std::size_t secret_bytes = 16;

/// Fills a secret with what nobody can predict. @throws std::system_error if the kernel has no random bytes.
KVFERRY_EXPORT void make_secret(std::span<std::byte, secret_bytes> secret);

/// Takes as long for any two secrets of a size.
[[nodiscard]] KVFERRY_EXPORT bool equal_secrets(std::span<const std::byte> a, std::span<const std::byte> b) noexcept;

}  // namespace kvferry
