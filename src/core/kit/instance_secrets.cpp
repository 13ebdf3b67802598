// SPDX-License-Identifier: Apache-2.0
#include "instance_secrets.hpp"

#include <sys/random.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <vector>

namespace kvferry::kit {
namespace {

struct SipState {
  std::uint64_t v0;
  std::uint64_t v1;
  std::uint64_t v2;
  std::uint64_t v3;

  void round() noexcept {
    v0 += v1;
    v1 = std::rotl(v1, 13) ^ v0;
    v0 = std::rotl(v0, 32);
    v2 += v3;
    v3 = std::rotl(v3, 16) ^ v2;
    v0 += v3;
    v3 = std::rotl(v3, 21) ^ v0;
    v2 += v1;
    v1 = std::rotl(v1, 17) ^ v2;
    v2 = std::rotl(v2, 32);
  }
  void take(std::uint64_t word) noexcept {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  }
};

std::uint64_t word_at(std::span<const std::byte> bytes, std::size_t offset) noexcept {
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < sizeof(word) && offset + i < bytes.size(); ++i) {
    word |= static_cast<std::uint64_t>(bytes[offset + i]) << (8 * i);
  }
  return word;
}

}  // namespace

std::uint64_t siphash(const std::array<std::uint64_t, 2>& key, std::span<const std::byte> message) noexcept {
  SipState state{key[0] ^ 0x736f6d6570736575, key[1] ^ 0x646f72616e646f6d, key[0] ^ 0x6c7967656e657261,
                 key[1] ^ 0x7465646279746573};
  const std::size_t whole = message.size() / 8 * 8;
  for (std::size_t offset = 0; offset < whole; offset += 8) {
    state.take(word_at(message, offset));
  }
  state.take(word_at(message, whole) | static_cast<std::uint64_t>(message.size()) << 56);
  state.v2 ^= 0xff;
  for (int i = 0; i < 4; ++i) {
    state.round();
  }
  return state.v0 ^ state.v1 ^ state.v2 ^ state.v3;
}

bool equal(std::span<const std::byte> a, std::span<const std::byte> b) noexcept {
  if (a.size() != b.size()) {
    return false;
  }
  std::byte difference{0};
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference |= a[i] ^ b[i];
  }
  return difference == std::byte{0};
}

InstanceSecrets::InstanceSecrets() {
  // Up to 256 bytes come whole and uninterrupted (getrandom(2)).
  if (::getrandom(keys_.data(), sizeof(keys_), 0) != static_cast<ssize_t>(sizeof(keys_))) {
    throw std::system_error(errno, std::system_category(), "getrandom");
  }
}

Bytes InstanceSecrets::for_peer(std::string_view peer_id, std::span<const std::byte> theirs) const {
  const auto id = std::as_bytes(std::span(peer_id));
  std::vector<std::byte> message(id.begin(), id.end());
  message.push_back(std::byte{0});
  message.insert(message.end(), theirs.begin(), theirs.end());
  Bytes secret(keys_.size() * sizeof(std::uint64_t));
  for (std::size_t i = 0; i < keys_.size(); ++i) {
    const std::uint64_t half = siphash(keys_[i], message);
    std::memcpy(secret.data() + i * sizeof(half), &half, sizeof(half));
  }
  return secret;
}

}  // namespace kvferry::kit
