// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include <kvferry/side_message.hpp>

namespace kvferry::kit {

/// SipHash-2-4: a keyed hash that nobody without the key can predict.
/// Source: J.-P. Aumasson, D. J. Bernstein, "SipHash: a fast short-input PRF", https://www.aumasson.jp/siphash/siphash.pdf
[[nodiscard]] std::uint64_t siphash(const std::array<std::uint64_t, 2>& key,
                                    std::span<const std::byte> message) noexcept;

/// Takes as long for any two secrets.
[[nodiscard]] bool equal(std::span<const std::byte> a, std::span<const std::byte> b) noexcept;

/// What a channel shows its peers to be known again: 16 bytes, others for each peer, so that no peer learns what another one is shown. They are computed, not
/// kept: an attempt made anew, or for a peer that was forgotten, shows what the first one showed.
class InstanceSecrets {
 public:
  /// @throws std::system_error if the kernel has no random bytes.
  InstanceSecrets();

  /// @param theirs what the peer has shown; empty if it has shown nothing yet. Somebody who gives himself out as the peer
  ///   and doesn't know its secret is shown another one.
  [[nodiscard]] Bytes for_peer(std::string_view peer_id, std::span<const std::byte> theirs = {}) const;

 private:
  std::array<std::array<std::uint64_t, 2>, 2> keys_{};
};

}  // namespace kvferry::kit
