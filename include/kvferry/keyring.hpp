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

/// A secret key. Each copy is overwritten when it is destroyed.
class KVFERRY_EXPORT SecretKey {
 public:
  /// No key.
  SecretKey() = default;
  /// @throws TransferError `std::errc::invalid_argument` if the text is no key; the error's sentence doesn't contain
  ///   the text.
  explicit SecretKey(std::string_view text);
  SecretKey(const SecretKey&) = default;
  SecretKey& operator=(const SecretKey&) = default;
  ~SecretKey();

  /// `key_characters` characters and a null; only a null if there is no key. Valid for as long as this object lives.
  [[nodiscard]] const char* text() const noexcept { return text_.data(); }

 private:
  std::array<char, key_characters + 1> text_{};
};

/// A Curve25519 key pair. A channel proves that it has the secret key. Others identify it by the public key.
struct KeyPair {
  std::string public_key;
  SecretKey secret_key;
};

/// Makes a new key pair.
/// @throws TransferError `errc::not_supported` if ZeroMQ was built without CURVE.
[[nodiscard]] KVFERRY_EXPORT KeyPair make_key_pair();
/// Computes the pair of a secret key that the program already has. @throws as `make_key_pair`.
[[nodiscard]] KVFERRY_EXPORT KeyPair key_pair_of(const SecretKey& secret_key);
/// Reads a secret key from the first line of a file. Only the file's owner may have the right to read or write it. A byte
/// order mark before the key is skipped.
/// @throws TransferError EACCES if others have, naming the file's mode and the right one; the errno of another failure;
///   `std::errc::invalid_argument` if the line is no key; as `make_key_pair`. All name the file.
[[nodiscard]] KVFERRY_EXPORT KeyPair read_key_pair(const std::string& path);
/// Takes a secret key, the first line, out of an environment variable, then overwrites and removes the variable. Don't
/// call it while other threads use the environment.
/// @throws TransferError `std::errc::invalid_argument` if there is no such variable or it is no key; as `make_key_pair`.
[[nodiscard]] KVFERRY_EXPORT KeyPair take_key_pair_from_environment(const char* variable);

/// Allows the owner of a key to be the peer with this id, and with no other.
struct PeerKey {
  /// Allows any id: for a group of programs that all trust each other and share one key pair.
  static constexpr std::string_view any_id = "*";

  std::string peer_id;
  std::string public_key;
};

/// Reads keys from a file. Each line has a public key, a space and an id. Empty lines and comments, which begin with
/// '#', are skipped. A key may begin with '#' as well: a line whose first word is a key is no comment. To comment a key
/// out, put '#' before it. Lines may end as Windows ends them, and a byte order mark is skipped.
/// @throws TransferError the errno of the failure, also if the file can't be read to its end;
///   `std::errc::invalid_argument` for an invalid line or id (`BaseTransferChannel::lazy_init_peer_connection`), naming
///   the line's number.
[[nodiscard]] KVFERRY_EXPORT std::vector<PeerKey> read_peer_keys(const std::string& path);

/// The keys that secure a channel's handshakes: its own key pair, and the keys of the peers that it trusts. Set it as
/// `ChannelOptions::keyring`; several channels may share one.
///
/// Keys may be replaced while channels use them. To replace a key without an interruption, first add the new public key
/// beside the old one on all peers, then give the owner the new pair, then drop the old key on all peers. Later
/// handshakes use the new keys. Existing connections stay until they are disconnected.
///
/// Thread safety: all functions may be called from any thread.
class KVFERRY_EXPORT Keyring {
 public:
  /// @throws TransferError `std::errc::invalid_argument` for an invalid key, naming its peer; `errc::empty_peer_id` or
  ///   `errc::invalid_peer_id` for an id that no channel can have.
  Keyring(KeyPair own, std::vector<PeerKey> peers);

  /// @throws TransferError as the constructor; then nothing changes.
  void replace_own(KeyPair own);
  /// @throws TransferError as the constructor; then nothing changes.
  void replace_peers(std::vector<PeerKey> peers);

  [[nodiscard]] KeyPair own() const;
  /// A number that changes when the own pair is replaced.
  [[nodiscard]] std::uint64_t revision() const noexcept { return revision_.load(std::memory_order_relaxed); }
  /// Whether this is the key of a peer.
  [[nodiscard]] bool knows(std::string_view public_key) const;
  /// Whether the owner of this key may have this id.
  [[nodiscard]] bool may_be(std::string_view public_key, std::string_view peer_id) const;
  /// The keys whose owners may have this id, in the order in which they were given; with an empty id, all keys.
  [[nodiscard]] std::vector<std::string> keys_of(std::string_view peer_id) const;

 private:
  mutable std::mutex mutex_;
  KeyPair own_;
  std::vector<PeerKey> peers_;
  std::atomic<std::uint64_t> revision_{0};
};

}  // namespace kvferry

#endif  // KVFERRY_KEYRING_HPP
