// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include <kvferry/keyring.hpp>

#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {

/// Where the channel under attack listens.
struct Target {
  std::array<char, 16> host{};  ///< An IPv4 address.
  std::uint16_t init_port = 0;
  std::uint16_t data_port = 0;

  [[nodiscard]] std::string init_url() const {
    return "tcp://" + std::string(host.data()) + ":" + std::to_string(init_port);
  }
};

/// Goes on until its process is killed.
using Attack = void (*)(const Target&);

/// The protection of the channel under attack.
enum class Secured { by_nothing, by_keys, by_certificates };

struct NamedAttack {
  std::string_view name;
  std::string_view does;
  Attack run;
  Secured hub = Secured::by_nothing;
  std::string_view noticed = {};  ///< A part of what the channel logs of it.
  bool becomes_peer = false;      ///< Before it does what it does.
};

/// On a channel without keys.
[[nodiscard]] std::span<const NamedAttack> attacks();
/// On one with a keyring, by who has no key, or one that isn't good for what he does.
[[nodiscard]] std::span<const NamedAttack> attacks_on_keys();
/// On one with certificates as well, by who has no key, or a key and no certificate that is good, or both.
[[nodiscard]] std::span<const NamedAttack> attacks_on_certificates();

/// The keys of the parties, in this process and in those that it forks later.
struct Keys {
  KeyPair hub = make_key_pair();
  KeyPair honest = make_key_pair();   ///< Good for all ids but "insider".
  KeyPair insider = make_key_pair();  ///< Good for "insider", which attacks.
  KeyPair stolen = make_key_pair();   ///< Good for all ids.
};
[[nodiscard]] const Keys& keys();
[[nodiscard]] std::shared_ptr<const Keyring> keyring_of_hub();
/// Of a peer of the hub's.
[[nodiscard]] std::shared_ptr<const Keyring> keyring_with(const KeyPair& own);

/// The certificates of the parties, likewise.
struct Certificates {
  testing::Identity ca = testing::authority("ca");
  testing::CertificateDirectory hub{testing::issue({.name = "hub", .by = &ca}), ca};
  testing::CertificateDirectory honest{testing::issue({.name = "honest", .by = &ca}), ca};
  testing::Identity insider = testing::issue({.name = "insider", .by = &ca});  ///< Good, and attacks.
  testing::Identity expired = testing::issue({.name = "expired", .by = &ca, .from = -7200, .to = -60});
};
[[nodiscard]] const Certificates& certificates();

/// @return a socket, connected if that was possible. Ends the process if nobody listens there: an attack on nobody proves
/// nothing.
[[nodiscard]] int connect_to(const Target& target, std::uint16_t port);

/// Connects again and again, says a few bytes, and lets the oldest connection go when it has many.
[[noreturn]] void hold_connections(const Target& target, std::uint16_t port, std::string_view says);
/// Stops within ZeroMQ's greeting.
void half_a_greeting(const Target& target);
/// Speaks ZeroMQ as far as to be understood, without keys, and then says nothing.
void idle_handshakes(const Target& target);
/// Stops within the hello of a data connection.
void no_hello(const Target& target);

}  // namespace kvferry::hostile
