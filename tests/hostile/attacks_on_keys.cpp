// SPDX-License-Identifier: Apache-2.0
#include "hostile/attacks.hpp"

#include <openssl/bio.h>
#include <openssl/ssl.h>

#include <array>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zmq.hpp>

#include <kvferry/tcp_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::hostile {
namespace {

/// Knows the hub's public key, as everybody may, and has a key of his own that the hub doesn't know.
void unknown_keys(const Target& target) {
  constexpr std::size_t most = 100;
  const std::string hub_key = keys().hub.public_key;
  zmq::context_t context;
  std::deque<zmq::socket_t> held;
  for (;;) {
    try {
      const KeyPair own = make_key_pair();
      zmq::socket_t& socket = held.emplace_back(context, zmq::socket_type::dealer);
      socket.set(zmq::sockopt::linger, 0);
      socket.set(zmq::sockopt::reconnect_ivl, 1);
      socket.set(zmq::sockopt::curve_serverkey, hub_key);
      socket.set(zmq::sockopt::curve_publickey, own.public_key);
      socket.set(zmq::sockopt::curve_secretkey, std::string(own.secret_key.text()));
      socket.connect(target.init_url());
      (void)socket.send(zmq::str_buffer("let me in"), zmq::send_flags::dontwait);
      if (held.size() == most) {
        held.pop_front();
      }
    } catch (const std::exception&) {
      held.clear();  // ZeroMQ closes them when it gets to it: there were too many for it
    }
  }
}

/// Has a key that the hub knows, and says to be who has another one.
void anothers_id(const Target& target) {
  for (;;) {
    TcpOptions options;
    options.keyring = keyring_with(keys().insider);
    TcpTransferChannel channel(options);
    for (int i = 0; i < 20; ++i) {
      std::error_code ec;
      channel.lazy_init_peer_connection("honest", "hub", target.init_url(), {}, {}, ec);
    }
  }
}

/// The first bytes of a program that opens a TLS connection as to any server.
std::string client_hello() {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
  const std::unique_ptr<SSL, decltype(&SSL_free)> session(SSL_new(context.get()), SSL_free);
  BIO* const out = BIO_new(BIO_s_mem());
  SSL_set_bio(session.get(), BIO_new(BIO_s_mem()), out);
  (void)SSL_connect(session.get());
  std::array<char, 4096> bytes{};
  const int size = BIO_read(out, bytes.data(), static_cast<int>(bytes.size()));
  return {bytes.data(), static_cast<std::size_t>(size > 0 ? size : 0)};
}

void client_hellos(const Target& target) { hold_connections(target, target.data_port, client_hello()); }

/// A byte of ClientHello's record, and then nothing.
void half_a_record(const Target& target) { hold_connections(target, target.data_port, "\x16\x03\x01"); }

constexpr std::array all_on_keys{
    NamedAttack{"UnknownKeys", "handshakes with keys that nobody knows", unknown_keys, Secured::by_keys},
    NamedAttack{"AnothersId", "a peer with a key that says to be another one", anothers_id, Secured::by_keys},
    NamedAttack{"PlainHandshakes", "700 connections that begin a handshake without keys", idle_handshakes,
                Secured::by_keys},
    NamedAttack{"HalfAGreeting", "700 that stop within ZeroMQ's greeting", half_a_greeting, Secured::by_keys},
    NamedAttack{"NoTls", "700 connections to the data port that begin a hello in the clear", no_hello, Secured::by_keys,
                "isn't encrypted with the key of a handshake"},
    NamedAttack{"HalfARecord", "700 that stop within a record of TLS's", half_a_record, Secured::by_keys,
                "had to make room for a newer one"},
    NamedAttack{"ClientHellos", "700 that say hello as to any TLS server", client_hellos, Secured::by_keys,
                "isn't encrypted with the key of a handshake"},
};

}  // namespace

const Keys& keys() {
  static const Keys all_keys;
  return all_keys;
}

std::shared_ptr<const Keyring> keyring_of_hub() {
  return std::make_shared<const Keyring>(keys().hub,
                                         std::vector<PeerKey>{{std::string(PeerKey::any_id), keys().honest.public_key},
                                                              {std::string(PeerKey::any_id), keys().stolen.public_key},
                                                              {"insider", keys().insider.public_key}});
}

std::shared_ptr<const Keyring> keyring_with(const KeyPair& own) {
  return std::make_shared<const Keyring>(own, std::vector<PeerKey>{{"hub", keys().hub.public_key}});
}

std::span<const NamedAttack> attacks_on_keys() { return all_on_keys; }

}  // namespace kvferry::hostile
