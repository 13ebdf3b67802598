// SPDX-License-Identifier: Apache-2.0
#include "hostile/attacks.hpp"

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/ssl.h>

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <zmq.hpp>

#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/hello.hpp>
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {
namespace {

using testing::Identity;
using HandshakesName = std::array<std::byte, 16>;
using CertificateHash = std::array<std::byte, 32>;

/// What the hub has answered to a question.
struct Answered {
  HandshakesName name{};
  tcp::Hello hello;  ///< That belongs to it.
};

/// Asks the hub with a key that is good for any id.
class Asking {
 public:
  explicit Asking(const Target& target) : target_(target) { connect(); }

  /// @param told of the certificate that is to be shown.
  [[nodiscard]] Answered ask(const CertificateHash& told) {
    for (;;) {
      kit::InitQuestion question;
      question.transport = "tcp";
      question.sender_id = "stranger-" + std::to_string(++asked_);
      question.receiver_id = "hub";
      question.incarnation = asked_;
      question.regions = {{4096, 4096, 3}};
      question.endpoint = kit::encode_endpoint(tcp::DialEndpoint{1, true, Bytes(told.begin(), told.end())});
      const auto bytes = encode_side_message(question).encoded();
      socket_->send(zmq::message_t(), zmq::send_flags::sndmore);
      socket_->send(zmq::buffer(bytes.data(), bytes.size()), zmq::send_flags::none);
      zmq::message_t answer;
      if (!socket_->recv(answer) || !socket_->recv(answer)) {
        connect();
        continue;
      }
      std::error_code ec;
      const auto message = parse_side_message({static_cast<const std::byte*>(answer.data()), answer.size()}, ec);
      const auto accepted = ec ? kit::InitAnswer() : decode_side_message<kit::InitAnswer>(message, ec);
      const auto endpoint = kit::decode_endpoint<tcp::AcceptEndpoint>(accepted.endpoint, ec);
      if (ec || !endpoint.tls_identity) {
        continue;
      }
      Answered answered;
      std::ranges::copy(*endpoint.tls_identity, answered.name.begin());
      answered.hello.lane_count = 1;
      answered.hello.incarnation = asked_;
      std::ranges::copy(endpoint.dial_secret, answered.hello.secret.begin());
      return answered;
    }
  }

 private:
  void connect() {
    socket_.emplace(context_, zmq::socket_type::dealer);
    socket_->set(zmq::sockopt::linger, 0);
    socket_->set(zmq::sockopt::rcvtimeo, 5'000);
    socket_->set(zmq::sockopt::curve_serverkey, keys().hub.public_key);
    socket_->set(zmq::sockopt::curve_publickey, keys().stolen.public_key);
    socket_->set(zmq::sockopt::curve_secretkey, std::string(keys().stolen.secret_key.text()));
    socket_->connect(target_.init_url());
  }

  const Target target_;
  zmq::context_t context_;
  std::optional<zmq::socket_t> socket_;
  std::uint64_t asked_ = 0;
};

/// A dialing side of TLS whose bytes its owner moves.
class Dialing {
 public:
  /// @param shows null: no certificate.
  Dialing(const HandshakesName& name, const Identity* shows)
      : name_(name), context_(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free) {
    SSL_CTX_set_min_proto_version(context_.get(), TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context_.get(), "TLS_AES_128_GCM_SHA256");
    SSL_CTX_set_ex_data(context_.get(), 0, this);
    SSL_CTX_set_keylog_callback(context_.get(), [](const SSL* ssl, const char* line) {
      static_cast<Dialing*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), 0))->note(line);
    });
    testing::name_handshake(context_.get(), name_);
    if (shows != nullptr) {
      SSL_CTX_use_certificate(context_.get(), shows->certificate.get());
      SSL_CTX_use_PrivateKey(context_.get(), shows->key.get());
    }
    ssl_.reset(SSL_new(context_.get()));
    SSL_set_bio(ssl_.get(), BIO_new(BIO_s_mem()), BIO_new(BIO_s_mem()));
    SSL_set_connect_state(ssl_.get());
  }
  Dialing(const Dialing&) = delete;
  Dialing& operator=(const Dialing&) = delete;

  /// Takes what it has heard. @return what it says next, if anything.
  [[nodiscard]] std::string go_on(std::string_view heard = {}) {
    (void)BIO_write(SSL_get_rbio(ssl_.get()), heard.data(), static_cast<int>(heard.size()));
    done_ = SSL_do_handshake(ssl_.get()) == 1;
    char* says = nullptr;
    const long size = BIO_get_mem_data(SSL_get_wbio(ssl_.get()), &says);
    std::string said(says, static_cast<std::size_t>(size));
    (void)BIO_reset(SSL_get_wbio(ssl_.get()));
    return said;
  }
  /// For its part.
  [[nodiscard]] bool done() const noexcept { return done_; }
  /// From which its keys come, once it is done.
  [[nodiscard]] const std::array<unsigned char, 32>& secret() const noexcept { return secret_; }

 private:
  void note(std::string_view line) {
    constexpr std::string_view label = "CLIENT_TRAFFIC_SECRET_0 ";
    if (line.starts_with(label)) {
      const std::string_view digits = line.substr(line.rfind(' ') + 1);
      for (std::size_t i = 0; i < secret_.size() && 2 * i + 1 < digits.size(); ++i) {
        secret_[i] = static_cast<unsigned char>(std::stoi(std::string(digits.substr(2 * i, 2)), nullptr, 16));
      }
    }
  }

  HandshakesName name_;
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_;
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_{nullptr, &SSL_free};
  std::array<unsigned char, 32> secret_{};
  bool done_ = false;
};

/// Says all of it unless the other side hangs up.
bool say(int socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) {
      return false;
    }
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
  return true;
}

std::string hear(int socket) {
  std::string heard(std::size_t{64} << 10, '\0');
  const ssize_t size = ::recv(socket, heard.data(), heard.size(), 0);
  heard.resize(static_cast<std::size_t>(std::max<ssize_t>(size, 0)));
  return heard;
}

int dial(const Target& target) {
  const int socket = connect_to(target, target.data_port);
  // Under attack the hub may be slow to say something, or may say nothing.
  const timeval patience{2, 0};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  return socket;
}

/// Shows nothing yet, but has heard all that it takes to. @return what would be next.
std::string hear_hub(int socket, Dialing& dialing) {
  std::string next;
  if (say(socket, dialing.go_on())) {
    while (!dialing.done()) {
      const std::string heard = hear(socket);
      if (heard.empty()) {
        return {};
      }
      next += dialing.go_on(heard);
    }
  }
  return next;
}

constexpr std::size_t many = 700;

/// Many connections.
class Held {
 public:
  Held() = default;
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    for (const int socket : held_) {
      ::close(socket);
    }
  }

  /// The oldest one goes if there are too many.
  void hold(int socket) {
    held_.push_back(socket);
    if (held_.size() == many) {
      ::close(held_.front());
      held_.pop_front();
    }
  }
  /// If there are too many, waits for the hub to let go of one.
  void hold_on(int socket) {
    held_.push_back(socket);
    while (held_.size() == many) {
      std::vector<pollfd> polled;
      for (const int one : held_) {
        polled.push_back({one, POLLRDHUP, 0});
      }
      (void)::poll(polled.data(), polled.size(), 1'000);
      held_.clear();
      for (const pollfd& one : polled) {
        if (one.revents == 0) {
          held_.push_back(one.fd);
        } else {
          ::close(one.fd);
        }
      }
    }
  }

 private:
  std::deque<int> held_;
};

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

/// Writes TLS's records as nobody's library would: any type, any length.
class Records {
 public:
  explicit Records(const std::array<unsigned char, 32>& secret)
      : secret_(secret), cipher_(EVP_CIPHER_CTX_new(), &EVP_CIPHER_CTX_free) {
    set_keys();
  }

  static constexpr unsigned char alert = 21;
  static constexpr unsigned char handshake = 22;
  static constexpr unsigned char data = 23;

  void add(unsigned char type, std::string_view content) {
    std::array<unsigned char, 12> nonce = iv_;
    for (std::size_t i = 0; i < 8; ++i) {
      nonce[11 - i] ^= static_cast<unsigned char>(sequence_ >> (8 * i));
    }
    ++sequence_;
    const std::size_t size = content.size() + 1 + tag;
    const std::array<unsigned char, 5> header{data, 3, 3, static_cast<unsigned char>(size >> 8),
                                              static_cast<unsigned char>(size)};
    const std::size_t begin = bytes_.size();
    bytes_.resize(begin + header.size() + size);
    auto* const to = reinterpret_cast<unsigned char*>(bytes_.data()) + begin;
    std::memcpy(to, header.data(), header.size());
    std::memcpy(to + header.size(), content.data(), content.size());
    to[header.size() + content.size()] = type;
    int written = 0;
    EVP_EncryptInit_ex(cipher_.get(), nullptr, nullptr, nullptr, nonce.data());
    EVP_EncryptUpdate(cipher_.get(), nullptr, &written, header.data(), static_cast<int>(header.size()));
    EVP_EncryptUpdate(cipher_.get(), to + header.size(), &written, to + header.size(),
                      static_cast<int>(content.size() + 1));
    EVP_EncryptFinal_ex(cipher_.get(), to + header.size() + written, &written);
    EVP_CIPHER_CTX_ctrl(cipher_.get(), EVP_CTRL_AEAD_GET_TAG, tag, to + header.size() + content.size() + 1);
  }
  /// A KeyUpdate, and what follows from it.
  void change_key(bool asks) {
    add(handshake, std::string_view(asks ? "\x18\0\0\1\1" : "\x18\0\0\1\0", 5));
    secret_ = expand<32>("traffic upd");
    set_keys();
  }
  /// What has been added since the last time.
  [[nodiscard]] std::string take() { return std::exchange(bytes_, {}); }
  [[nodiscard]] std::size_t size() const noexcept { return bytes_.size(); }

 private:
  static constexpr std::size_t tag = 16;

  /// HKDF-Expand-Label (RFC 8446, 7.1), of at most one hash.
  template <std::size_t Size>
  [[nodiscard]] std::array<unsigned char, Size> expand(std::string_view label) const {
    std::string info{0, static_cast<char>(Size), static_cast<char>(6 + label.size())};
    info += "tls13 ";
    info += label;
    info += std::string_view("\0\1", 2);
    std::array<unsigned char, 32> whole{};
    HMAC(EVP_sha256(), secret_.data(), static_cast<int>(secret_.size()),
         reinterpret_cast<const unsigned char*>(info.data()), info.size(), whole.data(), nullptr);
    std::array<unsigned char, Size> part{};
    std::copy_n(whole.begin(), Size, part.begin());
    return part;
  }
  void set_keys() {
    const auto key = expand<16>("key");
    iv_ = expand<12>("iv");
    sequence_ = 0;
    EVP_EncryptInit_ex(cipher_.get(), EVP_aes_128_gcm(), nullptr, key.data(), iv_.data());
  }

  std::array<unsigned char, 32> secret_;
  std::array<unsigned char, 12> iv_{};
  std::uint64_t sequence_ = 0;
  const std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)> cipher_;
  std::string bytes_;
};

/// Of writes without end to pages of the hub's.
class Writing {
 public:
  Writing() {
    constexpr std::size_t page = 4096;
    constexpr std::size_t objects = tcp::max_chunk_bytes / page;
    tcp::FrameHeader header;
    header.count = objects;
    header.payload_bytes = objects * page;
    header.flags = tcp::FrameHeader::last_chunk;
    append(header);
    for (std::size_t i = 0; i < objects; ++i) {
      append(tcp::Descriptor{63, page});
    }
    bytes_.resize(bytes_.size() + header.payload_bytes);
    append(tcp::FrameTrailer{});
  }
  [[nodiscard]] std::string_view next() {
    const std::string_view one = std::string_view(bytes_).substr(at_, 1);
    at_ = (at_ + 1) % bytes_.size();
    return one;
  }

 private:
  template <class Part>
  void append(const Part& part) {
    bytes_.append(reinterpret_cast<const char*>(&part), sizeof(part));
  }

  std::string bytes_;
  std::size_t at_ = 0;
};

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
