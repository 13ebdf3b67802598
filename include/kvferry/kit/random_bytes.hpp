// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_RANDOM_BYTES_HPP
#define KVFERRY_KIT_RANDOM_BYTES_HPP

#include <algorithm>
#include <array>
#include <cstddef>

#include <kvferry/config.hpp>
#include <kvferry/side_message.hpp>

#include <kvferry/detail/secret.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Bytes that nobody can predict: for a secret, or for a name that nobody may guess.
/// @throws std::system_error if the kernel has no random bytes.
[[nodiscard]] inline Bytes random_bytes(std::size_t count) {
  Bytes bytes(count);
  for (std::size_t at = 0; at < count; at += secret_bytes) {
    std::array<std::byte, secret_bytes> drawn{};
    make_secret(drawn);
    std::copy_n(drawn.begin(), (std::min)(count - at, drawn.size()), bytes.begin() + static_cast<std::ptrdiff_t>(at));
  }
  return bytes;
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_RANDOM_BYTES_HPP
