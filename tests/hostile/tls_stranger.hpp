// SPDX-License-Identifier: Apache-2.0
#pragma once

// The means of an attacker who speaks TLS with the hub.
#include <openssl/bio.h>
#include <openssl/ssl.h>

#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zmq.hpp>

#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/tcp/hello.hpp>
#include "common/certificates.hpp"
#include "hostile/attacks.hpp"

namespace kvferry::inline KVFERRY_ABI::hostile {

using testing::Identity;
using HandshakesName = std::array<std::byte, 16>;
using CertificateHash = std::array<std::byte, 32>;

/// The hub's answer to a question.
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
inline bool say(int socket, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) {
      return false;
    }
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
  return true;
}

inline std::string hear(int socket) {
  std::string heard(std::size_t{64} << 10, '\0');
  const ssize_t size = ::recv(socket, heard.data(), heard.size(), 0);
  heard.resize(static_cast<std::size_t>(std::max<ssize_t>(size, 0)));
  return heard;
}

inline int dial(const Target& target) {
  const int socket = connect_to(target, target.data_port);
  // Under attack the hub may be slow to say something, or may say nothing.
  const timeval patience{2, 0};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  return socket;
}

/// Shows nothing yet, but has heard all that it takes to. @return what would be next.
inline std::string hear_hub(int socket, Dialing& dialing) {
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

inline constexpr std::size_t many = 700;

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

}  // namespace kvferry::hostile
