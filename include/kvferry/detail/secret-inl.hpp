// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/secret.hpp>

#include <sys/random.h>

#include <cerrno>
#include <system_error>

namespace kvferry::inline KVFERRY_ABI {

KVFERRY_INLINE void make_secret(std::span<std::byte, secret_bytes> secret) {
  // Up to 256 bytes come whole and uninterrupted (getrandom(2)).
  if (::getrandom(secret.data(), secret.size(), 0) != static_cast<ssize_t>(secret.size())) {
    throw std::system_error(errno, std::system_category(), "getrandom");
  }
}

KVFERRY_INLINE bool equal_secrets(std::span<const std::byte> a, std::span<const std::byte> b) noexcept {
  if (a.size() != b.size()) {
    return false;
  }
  std::byte difference{0};
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= a[i] ^ b[i];
  }
  return difference == std::byte{0};
}

}  // namespace kvferry
