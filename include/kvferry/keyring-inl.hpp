// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/keyring.hpp>

#include <string.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <system_error>
#include <utility>

#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE bool is_key(std::string_view text) {
  constexpr std::string_view of_z85 =
      "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
  return text.size() == key_characters && text.find_first_not_of(of_z85) == std::string_view::npos;
}

[[noreturn]] KVFERRY_INLINE void refuse_key(const std::string& what) {
  throw TransferError(std::make_error_code(std::errc::invalid_argument),
                      what + " is no key: a key is " + std::to_string(key_characters) + " characters of Z85");
}

KVFERRY_INLINE void check_peer_keys(const std::vector<PeerKey>& peers) {
  for (const PeerKey& peer : peers) {
    if (!is_key(peer.public_key)) {
      refuse_key(in_quotes(peer.public_key) + ", given for peer " + in_quotes(peer.peer_id) + ",");
    }
    if (peer.peer_id.empty()) {
      throw TransferError(errc::empty_peer_id, "the key " + peer.public_key + " is given for an empty peer id");
    }
    if (const std::string why = why_no_id(peer.peer_id); !why.empty()) {
      throw TransferError(errc::invalid_peer_id,
                          "the key " + peer.public_key + " is given for " + in_quotes(peer.peer_id) + ", which " + why);
    }
  }
}

KVFERRY_INLINE void check_own_key(const KeyPair& own) {
  if (!is_key(own.public_key) || *own.secret_key.text() == '\0') {
    refuse_key("the keyring's own key pair");
  }
}

KVFERRY_INLINE bool fits(const PeerKey& peer, std::string_view peer_id) {
  return peer.peer_id == PeerKey::any_id || peer.peer_id == peer_id;
}

}  // namespace internal

KVFERRY_INLINE SecretKey::SecretKey(std::string_view text) {
  if (!is_key(text)) {
    refuse_key("what was given as a secret key");
  }
  std::ranges::copy(text, text_.begin());
}

KVFERRY_INLINE SecretKey::~SecretKey() { ::explicit_bzero(text_.data(), text_.size()); }

KVFERRY_INLINE std::vector<PeerKey> read_peer_keys(const std::string& path) {
  const auto refuse = [&] {
    throw TransferError(std::error_code(errno, std::system_category()), "peers' keys " + path);
  };
  std::ifstream file(path);
  if (!file) {
    refuse();
  }
  std::vector<PeerKey> keys;
  std::string line;
  for (std::size_t number = 1; std::getline(file, line); ++number) {
    if (number == 1 && line.starts_with(byte_order_mark)) {
      line.erase(0, byte_order_mark.size());
    }
    if (line.ends_with('\r')) {
      line.pop_back();
    }
    const std::string_view key = std::string_view(line).substr(0, line.find(' '));
    // One key of 85 begins with '#'.
    if (line.empty() || (line.front() == '#' && !is_key(key))) {
      continue;
    }
    if (!is_key(key) || line.size() < key_characters + 2) {
      throw TransferError(std::make_error_code(std::errc::invalid_argument),
                          path + ", line " + std::to_string(number) + ": not a public key, a space and a peer's id");
    }
    std::string id = line.substr(key_characters + 1);
    if (const std::string why = why_no_id(id); !why.empty()) {
      throw TransferError(std::make_error_code(std::errc::invalid_argument),
                          path + ", line " + std::to_string(number) + ": the peer's id " + in_quotes(id) + " " + why);
    }
    keys.push_back({std::move(id), std::string(key)});
  }
  // A directory is opened, and can't be read. Keys that are missed would be peers that are turned away.
  if (file.bad()) {
    refuse();
  }
  return keys;
}

KVFERRY_INLINE Keyring::Keyring(KeyPair own, std::vector<PeerKey> peers)
    : own_(std::move(own)), peers_(std::move(peers)) {
  check_own_key(own_);
  check_peer_keys(peers_);
}

KVFERRY_INLINE void Keyring::replace_own(KeyPair own) {
  check_own_key(own);
  const std::lock_guard lock(mutex_);
  own_ = std::move(own);
  ++revision_;
}

KVFERRY_INLINE void Keyring::replace_peers(std::vector<PeerKey> peers) {
  check_peer_keys(peers);
  const std::lock_guard lock(mutex_);
  peers_.swap(peers);
}

KVFERRY_INLINE KeyPair Keyring::own() const {
  const std::lock_guard lock(mutex_);
  return own_;
}

KVFERRY_INLINE bool Keyring::knows(std::string_view public_key) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::find(peers_, public_key, &PeerKey::public_key) != peers_.end();
}

KVFERRY_INLINE bool Keyring::may_be(std::string_view public_key, std::string_view peer_id) const {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(peers_,
                             [&](const PeerKey& peer) { return peer.public_key == public_key && fits(peer, peer_id); });
}

KVFERRY_INLINE std::vector<std::string> Keyring::keys_of(std::string_view peer_id) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> keys;
  for (const PeerKey& peer : peers_) {
    if ((peer_id.empty() || fits(peer, peer_id)) && std::ranges::find(keys, peer.public_key) == keys.end()) {
      keys.push_back(peer.public_key);
    }
  }
  return keys;
}

}  // namespace kvferry
