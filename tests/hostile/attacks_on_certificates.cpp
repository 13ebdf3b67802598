// SPDX-License-Identifier: Apache-2.0
#include "hostile/attacks.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <random>
#include <span>
#include <string>
#include <string_view>

#include "common/certificates.hpp"
#include "hostile/tls_records.hpp"
#include "hostile/tls_stranger.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {
namespace {

using testing::Identity;

void silent_connections(const Target& target) { hold_connections(target, target.data_port, {}); }

std::string noise(std::size_t size) {
  std::mt19937 random(4711);
  std::string bytes(size, '\0');
  std::ranges::generate(bytes, [&] { return static_cast<char>(random()); });
  return bytes;
}

void no_tls(const Target& target) { hold_connections(target, target.data_port, noise(900)); }

/// The header of a ClientHello's record, and behind it anything.
void garbled_hello(const Target& target) {
  hold_connections(target, target.data_port,
                   std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11) + noise(506));
}

void half_a_hello(const Target& target) {
  Dialing dialing({}, nullptr);
  const std::string hello = dialing.go_on();
  hold_connections(target, target.data_port, std::string_view(hello).substr(0, hello.size() / 2));
}

/// Names a handshake that isn't awaited.
void unknown_handshakes(const Target& target) {
  Dialing dialing({}, nullptr);
  hold_connections(target, target.data_port, dialing.go_on());
}

/// Has a key, and goes on until the hub has shown its certificate.
void stop_within_handshake(const Target& target) {
  Asking asking(target);
  Held held;
  for (;;) {
    const Answered answered = asking.ask({});
    Dialing dialing(answered.name, nullptr);
    const int socket = dial(target);
    (void)say(socket, dialing.go_on());
    held.hold_on(socket);
  }
}

/// Many connections at a time that all name one handshake: each costs the hub a signature.
void one_handshake_again_and_again(const Target& target) {
  Asking asking(target);
  for (;;) {
    const Answered answered = asking.ask({});
    Held held;
    Dialing dialing(answered.name, nullptr);
    const std::string hello = dialing.go_on();
    for (std::size_t i = 1; i < many; ++i) {
      const int socket = dial(target);
      (void)say(socket, hello);
      held.hold(socket);
    }
  }
}

/// Is as long as the hub takes it, and never ends.
void half_a_certificate(const Target& target) {
  const Identity long_one = testing::issue({.name = "long", .padding = 72'000});
  Asking asking(target);
  Held held;
  for (;;) {
    const Answered answered = asking.ask(long_one.hash());
    Dialing dialing(answered.name, &long_one);
    const int socket = dial(target);
    const std::string next = hear_hub(socket, dialing);
    (void)say(socket, std::string_view(next).substr(0, std::min<std::size_t>(next.size(), 70'000)));
    held.hold_on(socket);
  }
}

/// Says this behind its ClientHello, again and again.
void flood_handshake(const Target& target, std::string_view record) {
  std::string flood;
  while (flood.size() < (std::size_t{1} << 16)) {
    flood += record;
  }
  Asking asking(target);
  for (;;) {
    const Answered answered = asking.ask({});
    Dialing dialing(answered.name, nullptr);
    const int socket = dial(target);
    if (say(socket, dialing.go_on()) && !hear(socket).empty()) {
      while (say(socket, flood)) {
      }
    }
    ::close(socket);
  }
}

void alerts_within_handshake(const Target& target) {
  flood_handshake(target, std::string_view("\x15\x03\x03\x00\x02\x01\x5a", 7));
}
void changes_of_cipher(const Target& target) {
  flood_handshake(target, std::string_view("\x14\x03\x03\x00\x01\x01", 6));
}

/// Has a key, and shows a certificate that isn't good for it.
void show(const Target& target, const Identity* shows, const CertificateHash& told) {
  Asking asking(target);
  Held held;
  for (;;) {
    const Answered answered = asking.ask(told);
    Dialing dialing(answered.name, shows);
    const int socket = dial(target);
    (void)say(socket, hear_hub(socket, dialing));
    held.hold(socket);
  }
}

void no_certificate(const Target& target) { show(target, nullptr, {}); }
void self_signed(const Target& target) {
  const Identity own = testing::issue({.name = "insider"});
  show(target, &own, own.hash());
}
void another_authority(const Target& target) {
  const Identity authority = testing::authority("ca");
  const Identity own = testing::issue({.name = "insider", .by = &authority});
  show(target, &own, own.hash());
}
void expired(const Target& target) { show(target, &certificates().expired, certificates().expired.hash()); }
void another_than_told(const Target& target) { show(target, &certificates().insider, certificates().expired.hash()); }

/// Becomes a peer, with key and certificate, and says as many of these records as the hub takes, and so again and again.
void flood(const Target& target, void (*add)(Records&, Writing&)) {
  constexpr std::size_t at_a_time = std::size_t{64} << 20;
  Asking asking(target);
  const Identity& own = certificates().insider;
  for (;;) {
    const Answered answered = asking.ask(own.hash());
    Dialing dialing(answered.name, &own);
    const int socket = dial(target);
    if (say(socket, hear_hub(socket, dialing)) && dialing.done()) {
      Records records(dialing.secret());
      records.add(Records::data, {reinterpret_cast<const char*>(&answered.hello), sizeof(answered.hello)});
      Writing writing;
      bool heard = say(socket, records.take()) && !hear(socket).empty();
      while (heard) {
        while (records.size() < at_a_time) {
          add(records, writing);
        }
        std::array<char, 1 << 16> answers;
        while (::recv(socket, answers.data(), answers.size(), MSG_DONTWAIT) > 0) {
        }
        heard = say(socket, records.take());
      }
    }
    ::close(socket);
  }
}

void empty_records(const Target& target) {
  flood(target, [](Records& records, Writing& writing) {
    for (int i = 0; i < 31; ++i) {  // OpenSSL puts up with so many
      records.add(Records::data, {});
    }
    records.add(Records::data, writing.next());
  });
}
void tiny_records(const Target& target) {
  flood(target, [](Records& records, Writing& writing) { records.add(Records::data, writing.next()); });
}
void alerts(const Target& target) {
  flood(target, [](Records& records, Writing& writing) {
    for (int i = 0; i < 4; ++i) {  // likewise
      records.add(Records::alert, "\x01\x5a");
    }
    records.add(Records::data, writing.next());
  });
}
void renegotiation(const Target& target) {
  flood(target, [](Records& records, Writing&) {
    static const std::string hello = Dialing({}, nullptr).go_on().substr(5);
    records.add(Records::handshake, hello);
  });
}
void key_updates(const Target& target) {
  flood(target, [](Records& records, Writing&) { records.change_key(false); });
}
void key_updates_that_ask(const Target& target) {
  flood(target, [](Records& records, Writing&) { records.change_key(true); });
}
void key_updates_as_often_as_allowed(const Target& target) {
  flood(target, [](Records& records, Writing& writing) {
    for (int i = 0; i < 1024; ++i) {
      records.add(Records::data, writing.next());
    }
    records.change_key(false);
  });
}

constexpr NamedAttack on_certificates(std::string_view name, std::string_view does, Attack run,
                                      std::string_view noticed) {
  return {name, does, run, Secured::by_certificates, noticed};
}

constexpr NamedAttack of_a_peer(std::string_view name, std::string_view does, Attack run) {
  return {name, does, run, Secured::by_certificates, {}, true};
}

constexpr std::string_view of_no_handshake = "is of no handshake, or not with certificates";
constexpr std::string_view made_room = "without a hello had to make room";

constexpr std::array all_on_certificates{
    on_certificates("SilentConnections", "700 connections to the data port that say nothing", silent_connections,
                    made_room),
    on_certificates("NoTls", "700 that say 900 random bytes", no_tls, of_no_handshake),
    on_certificates("GarbledHello", "700 with a ClientHello of random bytes", garbled_hello, of_no_handshake),
    on_certificates("HalfAHello", "700 that stop within a ClientHello", half_a_hello, made_room),
    on_certificates("UnknownHandshakes", "700 with a ClientHello that names no handshake", unknown_handshakes,
                    of_no_handshake),
    on_certificates("StopWithinHandshake", "key: 700 that stop when this side has shown its certificate",
                    stop_within_handshake, {}),
    on_certificates("OneHandshake", "key: 700 at a time that name one handshake", one_handshake_again_and_again,
                    made_room),
    on_certificates("HalfACertificate", "key: 700 that stop within a certificate of 72 KB", half_a_certificate, {}),
    on_certificates("AlertsWithinHandshake", "key: alerts without end within TLS's handshake", alerts_within_handshake,
                    of_no_handshake),
    on_certificates("ChangesOfCipher", "key: ChangeCipherSpecs without end within TLS's handshake", changes_of_cipher,
                    of_no_handshake),
    on_certificates("NoCertificate", "key: no certificate", no_certificate, of_no_handshake),
    on_certificates("SelfSigned", "key: a self-signed certificate", self_signed,
                    "doesn't vouch for its certificate: self-signed certificate"),
    on_certificates("AnotherAuthority", "key: a certificate by another authority of the same name", another_authority,
                    "doesn't vouch for its certificate: certificate signature failure"),
    on_certificates("Expired", "key: an expired certificate", expired,
                    "doesn't vouch for its certificate: certificate has expired"),
    on_certificates("AnotherThanTold", "key: a good certificate, but another one than was told", another_than_told,
                    "and has told of one with SHA-256"),
    of_a_peer("EmptyRecords", "key and certificate: 31 empty records before each byte", empty_records),
    of_a_peer("TinyRecords", "key and certificate: a record for each byte", tiny_records),
    of_a_peer("Alerts", "key and certificate: 4 alerts before each byte", alerts),
    of_a_peer("Renegotiation", "key and certificate: ClientHellos within the connection", renegotiation),
    of_a_peer("KeyUpdates", "key and certificate: KeyUpdates", key_updates),
    of_a_peer("KeyUpdatesThatAsk", "key and certificate: KeyUpdates that ask for another", key_updates_that_ask),
    of_a_peer("KeyUpdatesAsAllowed", "key and certificate: a record for each byte, and a KeyUpdate after 1,024",
              key_updates_as_often_as_allowed),
};

}  // namespace

const Certificates& certificates() {
  static const Certificates all;
  return all;
}

std::span<const NamedAttack> attacks_on_certificates() { return all_on_certificates; }

}  // namespace kvferry::hostile
