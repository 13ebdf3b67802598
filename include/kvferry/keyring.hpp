// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KEYRING_HPP
#define KVFERRY_KEYRING_HPP

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Characters of a key: 32 bytes in Z85, the encoding of ZeroMQ's keys (https://rfc.zeromq.org/spec/32).
inline constexpr std::size_t key_characters = 40;

/// A secret key. Each copy is overwritten when it goes.
class KVFERRY_EXPORT SecretKey {
 public:
  /// None.
  SecretKey() = default;
  /// @throws TransferError `std::errc::invalid_argument` for what is no key; the sentence doesn't repeat it.
  explicit SecretKey(std::string_view text);
  SecretKey(const SecretKey&) = default;
  SecretKey& operator=(const SecretKey&) = default;
  ~SecretKey();

  /// `key_characters` characters and a null; the latter alone if there is none. Valid for as long as this lives.
  [[nodiscard]] const char* text() const noexcept { return text_.data(); }

 private:
  std::array<char, key_characters + 1> text_{};
};

/// A Curve25519 key pair. A channel proves that it has the secret key, and others know it by the public key.
struct KeyPair {
  std::string public_key;
  SecretKey secret_key;
};

/// A new key pair.
/// @throws TransferError `errc::not_supported` if ZeroMQ was built without CURVE.
[[nodiscard]] KVFERRY_EXPORT KeyPair make_key_pair();
/// The pair of a secret key that the program has from somewhere. @throws as `make_key_pair`.
[[nodiscard]] KVFERRY_EXPORT KeyPair key_pair_of(const SecretKey& secret_key);
/// Reads a secret key, which is the first line of a file that nobody but its owner may read or write.
/// @throws TransferError EACCES if others may, naming the file's mode and the one it should have; the errno of what else
///   failed; `std::errc::invalid_argument` for what is no key; as `make_key_pair`. All name the file.
[[nodiscard]] KVFERRY_EXPORT KeyPair read_key_pair(const std::string& path);
/// Takes a secret key out of an environment variable, which is overwritten and removed. Not while other threads look at the
/// environment.
/// @throws TransferError `std::errc::invalid_argument` if there is no such variable or it is no key; as `make_key_pair`.
[[nodiscard]] KVFERRY_EXPORT KeyPair take_key_pair_from_environment(const char* variable);

/// Allows the owner of a key to be the peer with this id, and with no other.
struct PeerKey {
  /// Allows any id: for a group of programs that all trust each other and share one key pair.
  static constexpr std::string_view any_id = "*";

  std::string peer_id;
  std::string public_key;
};

/// Reads keys from a file: a public key, a space and an id a line. Empty lines are skipped, and so are those that begin with
/// '#', unless their first word is a key, since a key may begin with '#'. A key with '#' put before it is none.
/// @throws TransferError the errno of what failed; `std::errc::invalid_argument` for a line that is neither, naming its number.
[[nodiscard]] KVFERRY_EXPORT std::vector<PeerKey> read_peer_keys(const std::string& path);

/// The keys that secure a channel's handshakes: its own key pair, and the keys of the peers that it trusts. Set it as
/// `ChannelOptions::keyring`; several channels may share one.
///
/// Keys may be replaced while channels use them. To replace one without an interruption, first add the new public key
/// beside the old one everywhere, then give the owner the new pair, then drop the old key everywhere. Later handshakes
/// use the new keys. Existing connections stay until they are disconnected.
///
/// Thread safety: all functions may be called from any thread.
class KVFERRY_EXPORT Keyring {
 public:
  /// @throws TransferError `std::errc::invalid_argument` for a key that is none, naming its peer.
  Keyring(KeyPair own, std::vector<PeerKey> peers);

  /// @throws TransferError as the constructor; then nothing changes.
  void replace_own(KeyPair own);
  /// @throws TransferError as the constructor; then nothing changes.
  void replace_peers(std::vector<PeerKey> peers);

  [[nodiscard]] KeyPair own() const;
  /// Changes with the own pair.
  [[nodiscard]] std::uint64_t revision() const noexcept { return revision_.load(std::memory_order_relaxed); }
  /// Whether it is the key of a peer.
  [[nodiscard]] bool knows(std::string_view public_key) const;
  /// Whether who has this key may have this id.
  [[nodiscard]] bool may_be(std::string_view public_key, std::string_view peer_id) const;
  /// The keys of who may have this id, in the order in which they were given; of an empty id: all keys.
  [[nodiscard]] std::vector<std::string> keys_of(std::string_view peer_id) const;

 private:
  mutable std::mutex mutex_;
  KeyPair own_;
  std::vector<PeerKey> peers_;
  std::atomic<std::uint64_t> revision_{0};
};

}  // namespace kvferry

#endif  // KVFERRY_KEYRING_HPP
