// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include <kvferry/keyring.hpp>

namespace kvferry::inline KVFERRY_ABI::hostile {

/// Where the channel under attack listens, on loopback.
struct Target {
  std::uint16_t init_port = 0;
  std::uint16_t data_port = 0;
};

/// Goes on until its process is killed.
using Attack = void (*)(const Target&);

struct NamedAttack {
  std::string_view name;
  std::string_view does;
  Attack run;
  bool keys = false;  ///< Whether the channel under attack has a keyring.
};

/// On a channel without keys.
[[nodiscard]] std::span<const NamedAttack> attacks();
/// On one with a keyring, by who has no key, or one that isn't good for what he does.
[[nodiscard]] std::span<const NamedAttack> attacks_on_keys();

/// Who has which key, in this process and in those that it forks later.
struct Keys {
  KeyPair hub = make_key_pair();
  KeyPair honest = make_key_pair();   ///< Good for all ids but "insider".
  KeyPair insider = make_key_pair();  ///< Good for "insider", which attacks.
};
[[nodiscard]] const Keys& keys();
[[nodiscard]] std::shared_ptr<const Keyring> keyring_of_hub();
/// Of a peer of the hub's.
[[nodiscard]] std::shared_ptr<const Keyring> keyring_with(const KeyPair& own);

/// Connects again and again, says a few bytes, and lets the oldest connection go when it has many.
[[noreturn]] void hold_connections(std::uint16_t port, std::string_view says);
/// Stops within ZeroMQ's greeting.
void half_a_greeting(const Target& target);
/// Speaks ZeroMQ as far as to be understood, without keys, and then says nothing.
void idle_handshakes(const Target& target);
/// Stops within the hello of a data connection.
void no_hello(const Target& target);

}  // namespace kvferry::hostile
