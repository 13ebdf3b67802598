// SPDX-License-Identifier: Apache-2.0
// Files of certificates: which are taken, and what is said of the others; and a stream of TLS's against a peer that shows what it
// likes.
#include <kvferry/tcp/certificates.hpp>

#include <gtest/gtest.h>

#include <asio/error.hpp>

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using kvferry::testing::authority;
using kvferry::testing::CertificateDirectory;
using kvferry::testing::ec_key;
using kvferry::testing::has;
using kvferry::testing::Identity;
using kvferry::testing::issue;
using kvferry::testing::rsa_key;

const std::error_code invalid = std::make_error_code(std::errc::invalid_argument);

class CertificatesTest : public ::testing::Test {
 protected:
  /// Why they aren't taken.
  std::error_code refused(std::string& why) {
    try {
      (void)tls_->read_certificates(directory_.files());
      why.clear();
      return {};
    } catch (const TransferError& error) {
      why = error.what();
      return error.code();
    }
  }
  void expect_refused(std::error_code code, const std::vector<std::string>& parts) {
    std::string why;
    EXPECT_EQ(refused(why), code) << why;
    for (const std::string& part : parts) {
      EXPECT_TRUE(has(why, part)) << part << " isn't in: " << why;
    }
    directory_.set(own_, ca_);
    EXPECT_FALSE(refused(why)) << "the next try is to begin with sound ones: " << why;
  }

  std::shared_ptr<Certificates> in_force() {
    auto logger = std::make_shared<kit::Logger>(
        [this](const LogRecord& record) {
          log_.emplace_back(std::string(record.event) + ": " + std::string(record.text));
        },
        LogLevel::debug);
    return std::make_shared<Certificates>(tls_, directory_.files(), logger);
  }

  const Identity ca_ = authority("ca");
  const Identity own_ = issue({.name = "own", .by = &ca_});
  const Identity next_ = issue({.name = "nxt", .by = &ca_});
  CertificateDirectory directory_{own_, ca_};
  const CertificateFiles files_ = directory_.files();
  const std::shared_ptr<TlsContext> tls_ = TlsContext::create();
  std::vector<std::string> log_;
};

TEST_F(CertificatesTest, KeysOfAllKindsAreTaken) {
  for (const auto& key : kvferry::testing::keys_of_all_kinds()) {
    const Identity made = issue({.name = "made", .by = &ca_, .key = key});
    directory_.set(made, ca_);
    const auto taken = tls_->read_certificates(files_);
    EXPECT_EQ(taken->hash(), made.hash());
    EXPECT_TRUE(has(taken->description(), "'CN=made', SHA-256 " + made.sha256())) << taken->description();
  }
  // All in one file, as some tools write it.
  const std::string all = own_.key_pem() + own_.pem() + ca_.pem();
  for (const std::string& path : {files_.chain, files_.key, files_.trusted}) {
    CertificateDirectory::put(path, all);
  }
  EXPECT_EQ(tls_->read_certificates(files_)->hash(), own_.hash());
}

TEST_F(CertificatesTest, FilesThatCanNotBeReadAreNamed) {
  for (const auto& [path, field] :
       {std::pair(files_.chain, "certificates.chain: "), std::pair(files_.key, "certificates.key: "),
        std::pair(files_.trusted, "certificates.trusted: ")}) {
    ::unlink(path.c_str());
    expect_refused({ENOENT, std::system_category()}, {field + path});
    CertificateDirectory::put(path, "");
    expect_refused(invalid, {field + path,
                             std::string(field) == "certificates.key: " ? "has no private key" : "has no certificate"});
    CertificateDirectory::put(path, "nonsense\n");
    expect_refused(invalid, {field + path});
    CertificateDirectory::put(path, std::string((std::size_t{1} << 20) + 1, '\n'));
    expect_refused(invalid, {field + path, "has more than a mebibyte"});
    ::unlink(path.c_str());
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    expect_refused(invalid, {field + path, "is no regular file"});
  }
  CertificateDirectory::put(files_.key, own_.pem());
  expect_refused(invalid, {files_.key, "has no private key"});
  CertificateDirectory::put(files_.chain, own_.key_pem());
  expect_refused(invalid, {files_.chain, "has no certificate"});
  std::string cut = own_.pem() + ca_.pem();
  cut.resize(cut.size() - 100);
  CertificateDirectory::put(files_.chain, cut);
  expect_refused(invalid, {files_.chain, "is broken behind 1 certificates"});
}

TEST_F(CertificatesTest, AKeyThatOthersCanReadIsRefusedAndSoIsOneThatIsNotTheCertificates) {
  for (const auto& [mode, name] : {std::pair(mode_t{0640}, "0640"), std::pair(mode_t{0602}, "0602")}) {
    CertificateDirectory::put(files_.key, own_.key_pem(), mode);
    expect_refused(std::make_error_code(std::errc::permission_denied),
                   {files_.key, std::string("has mode ") + name, "it must have mode 0600 or 0400"});
  }
  CertificateDirectory::put(files_.key, own_.key_pem(), 0400);
  std::string why;
  EXPECT_FALSE(refused(why)) << why;
  CertificateDirectory::put(files_.key, next_.key_pem());
  expect_refused(invalid, {files_.key, "isn't the key of the first certificate in the chain", own_.sha256()});
  const Identity other = issue({.name = "other", .by = &ca_, .key = rsa_key()});
  CertificateDirectory::put(files_.key, other.key_pem());
  expect_refused(invalid, {files_.key, "is of a key of type RSA, and that of the certificate is EC", own_.sha256()});
  CertificateDirectory::put(files_.key, own_.key_pem("secret"));
  expect_refused(invalid, {files_.key, "is of a key with a passphrase"});
  CertificateDirectory::put(files_.chain, ca_.pem() + own_.pem());
  expect_refused(invalid, {"certificates.chain", "isn't for TLS"});
}

TEST_F(CertificatesTest, WhatNoPeerWouldAcceptIsRefusedAtOnce) {
  struct Case {
    kvferry::testing::Wanted wanted;
    std::string part;
  };
  for (const Case& one :
       {Case{{.name = "late", .from = -7200, .to = -60}, "has expired, by "},
        Case{{.name = "early", .from = 3600, .to = 7200}, "isn't valid yet, at "},
        Case{{.name = "client", .uses = "clientAuth"}, "isn't for TLS servers (serverAuth)"},
        Case{{.name = "server", .uses = "serverAuth"}, "isn't for TLS clients (clientAuth)"},
        Case{{.name = "short", .key = rsa_key(1024)}, "key too small"},
        Case{{.name = "bitcoin", .key = ec_key("secp256k1")}, "on the curve secp256k1; TLS 1.3 takes"},
        Case{{.name = "brain", .key = ec_key("brainpoolP256r1")}, "on the curve brainpoolP256r1"},
        Case{{.name = "sha1", .digest = EVP_sha1()}, "ca md too weak"},
        Case{{.name = "large", .padding = 70'000}, "peers take 65536"}}) {
    kvferry::testing::Wanted wanted = one.wanted;
    wanted.by = &ca_;
    const Identity made = issue(wanted);
    directory_.set(made, ca_);
    expect_refused(invalid, {files_.chain, one.part});
  }
  const Identity whatever = issue({.name = "whatever", .by = &ca_, .uses = nullptr});
  directory_.set(whatever, ca_);
  std::string why;
  EXPECT_FALSE(refused(why)) << why;
  const Identity late_ca = issue({.name = "late", .by = &ca_, .ca = true, .to = -60});
  CertificateDirectory::put(files_.chain, own_.pem() + late_ca.pem());
  expect_refused(invalid, {files_.chain, "has behind it a certificate that has expired", late_ca.sha256()});
}

TEST_F(CertificatesTest, FilesThatChangeAreTakenUpWhenAllOfThemFitEachOther) {
  const auto certificates = in_force();
  const auto before = certificates->current();
  EXPECT_EQ(before->hash(), own_.hash());
  CertificateDirectory::put(files_.chain, next_.pem());
  EXPECT_EQ(certificates->current()->hash(), own_.hash()) << "the key isn't there yet";
  EXPECT_EQ(certificates->current()->hash(), own_.hash());
  ASSERT_EQ(log_.size(), 1U) << "once, however many look";
  EXPECT_TRUE(has(log_[0], "certificates_not_replaced: ") && has(log_[0], files_.key) && has(log_[0], own_.sha256()))
      << log_[0];
  CertificateDirectory::put(files_.key, next_.key_pem());
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
  ASSERT_EQ(log_.size(), 2U);
  EXPECT_TRUE(has(log_[1], "certificates_replaced: ") && has(log_[1], next_.sha256()) && has(log_[1], own_.sha256()))
      << log_[1];
  EXPECT_EQ(before->hash(), own_.hash()) << "who has told of it keeps it";
  CertificateDirectory::put(files_.trusted, "broken");
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
  ::unlink(files_.trusted.c_str());
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
  ASSERT_EQ(log_.size(), 4U);
  EXPECT_TRUE(has(log_[3], "No such file")) << log_[3];
  // The same as before.
  CertificateDirectory::put(files_.trusted, ca_.pem());
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
  EXPECT_EQ(log_.size(), 4U) << "nothing has been replaced";
}

TEST_F(CertificatesTest, WhereOnlyWhomToTrustHasChangedTheLogSaysSo) {
  const auto certificates = in_force();
  const Identity new_ca = authority("new ca");
  CertificateDirectory::put(files_.trusted, ca_.pem() + new_ca.pem());
  EXPECT_EQ(certificates->current()->hash(), own_.hash());
  ASSERT_EQ(log_.size(), 1U);
  EXPECT_TRUE(has(log_[0], "certificates_replaced: this side goes on showing 'CN=own', SHA-256 " + own_.sha256()) &&
              has(log_[0], "those that this side trusts"))
      << log_[0];
}

TEST_F(CertificatesTest, AFileThatIsWrittenOverIsTakenUpWhateverItsTimesSay) {
  const auto status_of = [](const std::string& path) {
    struct stat status {};
    EXPECT_EQ(::stat(path.c_str(), &status), 0);
    return status;
  };
  // Names of one length and keys of one kind; signatures differ in length.
  const std::size_t size = std::max(own_.pem().size(), next_.pem().size());
  const auto filled = [size](std::string text) { return text.append(size - text.size(), '\n'); };
  ASSERT_EQ(own_.key_pem().size(), next_.key_pem().size());
  CertificateDirectory::put(files_.chain, filled(own_.pem()));
  const auto certificates = in_force();
  EXPECT_EQ(certificates->current()->hash(), own_.hash()) << "and this looks at them";
  for (const auto& [path, text] :
       {std::pair(files_.key, next_.key_pem()), std::pair(files_.chain, filled(next_.pem()))}) {
    const struct stat before = status_of(path);
    CertificateDirectory::overwrite(path, text);
    const std::array times{before.st_atim, before.st_mtim};
    ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), times.data(), 0), 0);
    ASSERT_EQ(status_of(path).st_size, before.st_size);
    ASSERT_EQ(status_of(path).st_ino, before.st_ino);
  }
  EXPECT_EQ(certificates->current()->hash(), next_.hash());
}

/// Files that have been as they are for so long that nobody would look at them again if they were sound.
class OldCertificatesTest : public CertificatesTest {
 protected:
  static constexpr std::chrono::seconds long_enough{30};

  /// Looks at them until they are that old.
  static void grow_old(Certificates& certificates) {
    const auto old = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
    while (std::chrono::steady_clock::now() < old) {
      (void)certificates.current();
      std::this_thread::yield();
    }
  }
  static void expect_taken_up(Certificates& certificates, const Identity& fresh) {
    const auto deadline = std::chrono::steady_clock::now() + long_enough;
    while (certificates.current()->hash() != fresh.hash() && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
    EXPECT_EQ(certificates.current()->hash(), fresh.hash());
  }
};

TEST_F(OldCertificatesTest, ACertificateWhoseTimeIsYetToComeIsTakenUpWhenItHasCome) {
  const auto certificates = in_force();
  const Identity soon = issue({.name = "soon", .by = &ca_, .key = own_.key, .from = 5});
  CertificateDirectory::put(files_.chain, soon.pem());
  grow_old(*certificates);
  expect_taken_up(*certificates, soon);
  EXPECT_LE(log_.size(), 2U) << "each is logged once, however many look";
  EXPECT_TRUE(has(log_.back(), "certificates_replaced: ")) << log_.back();
}

TEST_F(OldCertificatesTest, FilesThatCouldNotBeReadOnceAreReadAgain) {
  const auto certificates = in_force();
  // All that is called below is called once before: sanitizers need descriptors to look at an object of a new type.
  ::unlink(files_.chain.c_str());
  EXPECT_EQ(certificates->current()->hash(), own_.hash());
  const Identity fresh = issue({.name = "fresh", .by = &ca_, .key = own_.key});
  CertificateDirectory::put(files_.chain, fresh.pem());
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit none = before;
  none.rlim_cur = 0;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  grow_old(*certificates);
  EXPECT_EQ(certificates->current()->hash(), own_.hash());
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  expect_taken_up(*certificates, fresh);
  ASSERT_EQ(log_.size(), 3U) << "each is logged once, however many look";
  EXPECT_TRUE(has(log_[1], "certificates_not_replaced: ") && has(log_[1], "Too many open files")) << log_[1];
  EXPECT_TRUE(has(log_[2], "certificates_replaced: ")) << log_[2];
}

/// OpenSSL as it is, that shows a certificate.
class Shower {
 public:
  /// What a dialing one says of the handshake.
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
    // Whatever the other side shows is good enough.
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
