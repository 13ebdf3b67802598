// SPDX-License-Identifier: Apache-2.0
// A stream of TLS's against a peer that shows what it likes.
#include <kvferry/tcp/certificates.hpp>

#include <gtest/gtest.h>

#include <asio/error.hpp>

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "certificates_fixture.hpp"
#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using kvferry::testing::rsa_key;

/// OpenSSL as it is, that shows a certificate.
class Shower {
 public:
  /// The part of the handshake that a dialing one shows.
  enum class Says { its_name, its_name_and_a_key, nothing };

  Shower(int descriptor, bool dials, const Identity* shown, const std::array<std::byte, 16>& identity,
         Says says = Says::its_name)
      : identity_(identity), context_(SSL_CTX_new(TLS_method()), &SSL_CTX_free) {
    SSL_CTX_set_min_proto_version(context_.get(), TLS1_3_VERSION);
    SSL_CTX_set_num_tickets(context_.get(), 0);
    SSL_CTX_set_security_level(context_.get(), 0);
    if (dials && says != Says::nothing) {
      kvferry::testing::name_handshake(context_.get(), identity_);
    }
    if (dials && says == Says::its_name_and_a_key) {
      SSL_CTX_set_psk_use_session_callback(context_.get(), [](SSL* ssl, const EVP_MD*, const unsigned char** name,
                                                              std::size_t* size, SSL_SESSION** session) {
        const auto& self = *static_cast<Shower*>(SSL_get_app_data(ssl));
        constexpr std::array<unsigned char, 2> suite{0x13, 0x01};
        constexpr std::array<unsigned char, 32> secret{};  // a handshake with certificates has no other one
        *session = SSL_SESSION_new();
        SSL_SESSION_set1_master_key(*session, secret.data(), secret.size());
        SSL_SESSION_set_cipher(*session, SSL_CIPHER_find(ssl, suite.data()));
        SSL_SESSION_set_protocol_version(*session, TLS1_3_VERSION);
        *name = reinterpret_cast<const unsigned char*>(self.identity_.data());
        *size = self.identity_.size();
        return 1;
      });
    }
    if (shown != nullptr) {
      EXPECT_EQ(SSL_CTX_use_certificate(context_.get(), shown->certificate.get()), 1);
      EXPECT_EQ(SSL_CTX_use_PrivateKey(context_.get(), shown->key.get()), 1);
    }
    // Any certificate of the other side is good enough.
    SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, [](int, X509_STORE_CTX*) { return 1; });
    ssl_.reset(SSL_new(context_.get()));
    SSL_set_fd(ssl_.get(), descriptor);
    SSL_set_app_data(ssl_.get(), this);
    SSL_set_info_callback(ssl_.get(), [](const SSL* ssl, int what, int value) {
      if ((what & SSL_CB_READ_ALERT) == SSL_CB_READ_ALERT) {
        static_cast<Shower*>(SSL_get_app_data(ssl))->alert = value & 0xff;
      }
    });
    if (dials) {
      SSL_set_connect_state(ssl_.get());
    } else {
      SSL_set_accept_state(ssl_.get());
    }
  }

  [[nodiscard]] SSL* ssl() const { return ssl_.get(); }

  int alert = 0;  ///< That was heard last.

 private:
  std::array<std::byte, 16> identity_;
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_;
  std::unique_ptr<SSL, decltype(&SSL_free)> ssl_{nullptr, &SSL_free};
};

class ShownCertificatesTest : public CertificatesTest {
 protected:
  ShownCertificatesTest() {
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0);
  }
  ~ShownCertificatesTest() override { end(); }
  void end() {
    stream_.reset();
    shower_.reset();
    for (int& descriptor : pair_) {
      ::close(std::exchange(descriptor, -1));
    }
  }

  /// A stream of this project's, which has been told of a certificate, and somebody who shows one. @return how it ended here.
  std::error_code meet(bool stream_dials, const Identity* shown, const Identity& told,
                       std::optional<std::array<std::byte, 16>> named = std::nullopt,
                       Shower::Says says = Shower::Says::its_name) {
    TlsKey key = random_tls_key();
    key.secret = {};
    key.certificates = tls_->read_certificates(files_);
    key.peers_certificate = told.hash();
    end();
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0);
    shower_ = std::make_unique<Shower>(pair_[1], !stream_dials, shown, named.value_or(key.identity), says);
    stream_ = stream_dials ? tls_->dial(pair_[0], key)
                           : tls_->accept(pair_[0], {}, [key](std::span<const std::byte> identity) {
                               return std::ranges::equal(identity, key.identity) ? std::optional(key) : std::nullopt;
                             });
    std::error_code ec = asio::error::would_block;
    for (int i = 0; i < 6 && ec == asio::error::would_block; ++i) {
      ec = stream_->shake_hands();
      (void)SSL_do_handshake(shower_->ssl());
    }
    return ec;
  }
  /// The number of the alert that the other side has heard; 0 if it has heard nothing.
  int alert_heard() {
    std::array<char, 100> buffer{};
    (void)SSL_read(shower_->ssl(), buffer.data(), buffer.size());
    ERR_clear_error();
    return shower_->alert;
  }

  std::array<int, 2> pair_{-1, -1};
  std::unique_ptr<Shower> shower_;
  std::unique_ptr<TlsStream> stream_;
};

TEST_F(ShownCertificatesTest, OnlyWhatWasToldAndTheCaVouchesForIsAccepted) {
  const Identity other_ca = authority("ca");
  const Identity late = issue({.name = "late", .by = &ca_, .from = -7200, .to = -60});
  const Identity early = issue({.name = "early", .by = &ca_, .from = 3600, .to = 7200});
  const Identity foreign = issue({.name = "own", .by = &other_ca});
  const Identity alone = issue({.name = "alone"});
  const Identity sha1 = issue({.name = "sha1", .by = &ca_, .digest = EVP_sha1()});
  const Identity small = issue({.name = "small", .by = &ca_, .key = rsa_key(1024)});
  const Identity large = issue({.name = "large", .by = &ca_, .padding = 100'000});
  for (const bool dials : {true, false}) {
    const Identity wrong_use = issue({.name = "use", .by = &ca_, .uses = dials ? "clientAuth" : "serverAuth"});
    EXPECT_FALSE(meet(dials, &next_, next_)) << stream_->why();
    EXPECT_TRUE(stream_->shaken());
    EXPECT_TRUE(has(stream_->description(), "with certificates")) << stream_->description();
    struct Case {
      const Identity* shown;
      const Identity* told;
      std::vector<std::string> parts;
      int alert;
    };
    for (const Case& one :
         {Case{&late, &late, {"certificate has expired, at ", late.sha256()}, SSL_AD_CERTIFICATE_EXPIRED},
          Case{&early, &early, {"certificate is not yet valid, at ", early.sha256()}, SSL_AD_BAD_CERTIFICATE},
          Case{&foreign, &foreign, {"certificates.trusted doesn't vouch", foreign.sha256()}, -1},
          Case{&alone, &alone, {"self-signed certificate", alone.sha256()}, SSL_AD_UNKNOWN_CA},
          Case{&wrong_use,
               &wrong_use,
               {"unsuitable certificate purpose", wrong_use.sha256()},
               SSL_AD_UNSUPPORTED_CERTIFICATE},
          Case{&sha1, &sha1, {"signature digest algorithm too weak", sha1.sha256()}, -1},
          Case{&small, &small, {small.sha256()}, -1},
          Case{&next_,
               &own_,
               {"shows a certificate with SHA-256 " + next_.sha256(), "has told of one with SHA-256 " + own_.sha256()},
               SSL_AD_BAD_CERTIFICATE},
          Case{&foreign, &next_, {"has told of one with SHA-256 " + next_.sha256()}, SSL_AD_BAD_CERTIFICATE}}) {
      EXPECT_EQ(meet(dials, one.shown, *one.told), errc::authentication_failed) << one.parts.back();
      EXPECT_FALSE(stream_->shaken());
      EXPECT_TRUE(stream_->refuses_certificate());
      for (const std::string& part : one.parts) {
        EXPECT_TRUE(has(stream_->why(), part)) << part << " isn't in: " << stream_->why();
      }
      if (one.alert >= 0) {
        EXPECT_EQ(alert_heard(), one.alert) << stream_->why();
      }
    }
    EXPECT_EQ(meet(dials, &large, large), errc::authentication_failed) << "100 KB of a chain";
    EXPECT_FALSE(stream_->shaken());
  }
  EXPECT_EQ(meet(false, nullptr, next_), errc::authentication_failed) << "it shows none";
}

TEST_F(ShownCertificatesTest, WhoNamesNoHandshakeHearsNothing) {
  EXPECT_EQ(meet(false, &next_, next_, std::array<std::byte, 16>{}), errc::authentication_failed);
  EXPECT_EQ(alert_heard(), 0);
  std::array<char, 10> heard{};
  EXPECT_EQ(::recv(pair_[1], heard.data(), heard.size(), MSG_DONTWAIT), -1);
  EXPECT_EQ(SSL_get0_peer_certificate(shower_->ssl()), nullptr);
}

TEST_F(ShownCertificatesTest, WhoSaysNothingOfAHandshakeHearsNothing) {
  EXPECT_EQ(meet(false, &next_, next_, std::nullopt, Shower::Says::nothing), errc::authentication_failed);
  EXPECT_EQ(alert_heard(), 0);
  EXPECT_EQ(SSL_get0_peer_certificate(shower_->ssl()), nullptr);
}

TEST_F(ShownCertificatesTest, AKeyBesideTheNameOfAHandshakeIsNothing) {
  EXPECT_FALSE(meet(false, &next_, next_, std::nullopt, Shower::Says::its_name_and_a_key)) << stream_->why();
  EXPECT_EQ(SSL_session_reused(shower_->ssl()), 0);
  EXPECT_TRUE(has(stream_->description(), "with certificates")) << stream_->description();
  EXPECT_EQ(meet(false, nullptr, next_, std::nullopt, Shower::Says::its_name_and_a_key), errc::authentication_failed);
  EXPECT_FALSE(stream_->shaken());
}

TEST_F(ShownCertificatesTest, ACertificateIsNoKeyAndAKeyIsNoCertificate) {
  TlsKey with = random_tls_key();
  with.certificates = tls_->read_certificates(files_);
  with.peers_certificate = own_.hash();
  TlsKey without = random_tls_key();
  without.identity = with.identity;
  without.secret = with.secret;
  for (const auto& [dialed, known] : {std::pair(with, without), std::pair(without, with)}) {
    end();
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0);
    stream_ = tls_->dial(pair_[0], dialed);
    const auto accepting =
        tls_->accept(pair_[1], {}, [known = known](std::span<const std::byte>) { return std::optional(known); });
    EXPECT_EQ(stream_->shake_hands(), asio::error::would_block);
    EXPECT_EQ(accepting->shake_hands(), errc::authentication_failed);
    EXPECT_FALSE(accepting->holds_back());
    ::shutdown(pair_[1], SHUT_RDWR);
    EXPECT_EQ(stream_->shake_hands(), asio::error::eof) << "not one byte";
  }
}

TEST_F(ShownCertificatesTest, TheRefusedSideLearnsWhyAndNamesItsOwn) {
  CertificateDirectory others;
  const Identity other_ca = authority("another ca");
  const Identity foreign = issue({.name = "foreign", .by = &other_ca});
  others.set(foreign, ca_);  // it trusts this side, which doesn't trust it
  for (const bool foreign_dials : {true, false}) {
    TlsKey of_foreign = random_tls_key();
    TlsKey of_own = of_foreign;
    of_foreign.certificates = tls_->read_certificates(others.files());
    of_foreign.peers_certificate = own_.hash();
    of_own.certificates = tls_->read_certificates(files_);
    of_own.peers_certificate = foreign.hash();
    const TlsKey& dialed = foreign_dials ? of_foreign : of_own;
    const TlsKey& known = foreign_dials ? of_own : of_foreign;
    end();
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0);
    stream_ = tls_->dial(pair_[0], dialed);
    const auto accepting =
        tls_->accept(pair_[1], {}, [known](std::span<const std::byte>) { return std::optional(known); });
    EXPECT_EQ(stream_->shake_hands(), asio::error::would_block);
    EXPECT_EQ(accepting->shake_hands(), asio::error::would_block);
    const auto dialing_ended = stream_->shake_hands();
    const auto accepting_ended = accepting->shake_hands();
    EXPECT_EQ(accepting_ended, errc::authentication_failed);
    std::string why = accepting->why();
    if (foreign_dials) {
      // TLS's dialing side is through with its handshake before it can know.
      EXPECT_FALSE(dialing_ended);
      std::array<std::byte, 10> heard{};
      EXPECT_EQ(stream_->receive(heard), -1);
      why = stream_->why();
    } else {
      EXPECT_EQ(dialing_ended, errc::authentication_failed);
    }
    EXPECT_TRUE(has(why, "it refuses this side's certificate (unknown CA") && has(why, foreign.sha256())) << why;
  }
}

}  // namespace
}  // namespace kvferry::tcp
