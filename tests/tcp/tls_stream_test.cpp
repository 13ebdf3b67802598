// SPDX-License-Identifier: Apache-2.0
// Two ends of TLS, without channels around them.
#include <kvferry/tcp/tls_stream.hpp>

#include <gtest/gtest.h>

#include <asio/error.hpp>

#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using Bytes = std::vector<std::byte>;

Bytes random_bytes(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  return bytes;
}

/// A dialing and an accepting end on a pair of sockets.
class TlsStreamTest : public ::testing::Test {
 protected:
  TlsStreamTest() { EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0); }
  ~TlsStreamTest() override {
    dialing_.reset();
    accepting_.reset();
    for (const int descriptor : pair_) {
      ::close(descriptor);
    }
  }

  /// @return how either side's handshake ended: of the dialing one, and of the accepting one.
  std::pair<std::error_code, std::error_code> shake_hands(const TlsKey& dialed, const TlsKey& known,
                                                          std::shared_ptr<TlsContext> context = TlsContext::create()) {
    dialing_ = context->dial(pair_[0], dialed);
    accepting_ = context->accept(pair_[1], {}, [known](std::span<const std::byte> identity) {
      return std::ranges::equal(identity, known.identity) ? std::optional(known) : std::nullopt;
    });
    std::error_code dialing = dialing_->shake_hands();
    const std::error_code accepting_first = accepting_->shake_hands();
    if (accepting_first && accepting_first != asio::error::would_block) {
      ::shutdown(pair_[1], SHUT_RDWR);
    }
    dialing = dialing_->shake_hands();
    return {dialing, accepting_first == asio::error::would_block ? accepting_->shake_hands() : accepting_first};
  }

  /// Sends all of it from one end, and receives it at the other by portions of `portion` bytes.
  static Bytes pass(TlsStream& from, TlsStream& to, const Bytes& bytes, std::size_t portion) {
    Bytes received;
    Bytes buffer(portion);
    std::size_t sent = 0;
    while (received.size() < bytes.size()) {
      bool moved = false;
      if (from.holds_back()) {
        moved = from.flush() == 0;
      } else if (sent < bytes.size()) {
        // A header, some bytes that share a record, and many that don't.
        std::vector<iovec> pieces;
        std::size_t of_now = 0;
        for (const std::size_t size : {64U, 100U, 40'000U, 1U}) {
          const std::size_t part = std::min<std::size_t>(size, bytes.size() - sent - of_now);
          pieces.push_back({const_cast<std::byte*>(bytes.data()) + sent + of_now, part});
          of_now += part;
        }
        EXPECT_EQ(from.send(pieces), static_cast<ssize_t>(of_now));
        sent += of_now;
        moved = true;
      }
      for (ssize_t part = 1; part > 0;) {
        part = to.receive(buffer);
        if (part > 0) {
          moved = true;
          received.insert(received.end(), buffer.begin(), buffer.begin() + part);
          if (part < static_cast<ssize_t>(buffer.size())) {
            break;  // that was all there is
          }
        } else {
          EXPECT_EQ(errno, EAGAIN);
        }
      }
      if (!moved) {
        ADD_FAILURE() << "nothing moves behind " << received.size() << " bytes";
        break;
      }
    }
    return received;
  }

  std::array<int, 2> pair_{-1, -1};
  std::unique_ptr<TlsStream> dialing_;
  std::unique_ptr<TlsStream> accepting_;
};

TEST_F(TlsStreamTest, BytesPassInBothDirectionsWhateverTheirPieces) {
  const TlsKey key = random_tls_key();
  const auto [dialing, accepting] = shake_hands(key, key);
  ASSERT_FALSE(dialing) << dialing.message();
  ASSERT_FALSE(accepting) << accepting.message();
  EXPECT_EQ(dialing_->description().substr(0, 8), "TLS 1.3 ");
  EXPECT_EQ(dialing_->description(), accepting_->description());
  EXPECT_EQ(accepting_->identity(), key.identity);
  for (const std::size_t portion : {1000U, 16384U, 300'000U}) {
    const Bytes bytes = random_bytes(1'000'000, static_cast<unsigned>(portion));
    EXPECT_EQ(pass(*dialing_, *accepting_, bytes, portion), bytes);
    EXPECT_EQ(pass(*accepting_, *dialing_, bytes, portion), bytes);
  }
}

TEST_F(TlsStreamTest, AKeyIsReplacedAfterItsRecords) {
  const TlsKey key = random_tls_key();
  const auto [dialing, accepting] = shake_hands(key, key, TlsContext::create(3));
  ASSERT_FALSE(dialing) << dialing.message();
  ASSERT_FALSE(accepting) << accepting.message();
  const Bytes bytes = random_bytes(500'000, 1);
  EXPECT_EQ(pass(*dialing_, *accepting_, bytes, 10'000), bytes);
  EXPECT_EQ(pass(*accepting_, *dialing_, bytes, 10'000), bytes);
}

TEST_F(TlsStreamTest, AWrongSecretEndsTheHandshakeAndIsToldNothing) {
  const TlsKey key = random_tls_key();
  TlsKey wrong = random_tls_key();
  wrong.identity = key.identity;
  const auto [dialing, accepting] = shake_hands(wrong, key);
  EXPECT_EQ(accepting, errc::authentication_failed);
  EXPECT_EQ(dialing, asio::error::eof) << "not one byte";
  EXPECT_TRUE(dialing_->first_received().empty());
}

TEST_F(TlsStreamTest, AnUnknownIdentityEndsTheHandshakeAndIsToldNothing) {
  TlsKey other = random_tls_key();
  const TlsKey key = random_tls_key();
  other.secret = key.secret;
  const auto [dialing, accepting] = shake_hands(other, key);
  EXPECT_EQ(accepting, errc::authentication_failed);
  EXPECT_EQ(dialing, asio::error::eof);
  EXPECT_TRUE(dialing_->first_received().empty());
}

TEST_F(TlsStreamTest, WhoAnswersWithSomethingElseIsNotBelieved) {
  const TlsKey key = random_tls_key();
  const auto context = TlsContext::create();
  dialing_ = context->dial(pair_[0], key);
  EXPECT_EQ(dialing_->shake_hands(), asio::error::would_block);
  const std::string nonsense("\x16\x03\x03\x00\x05 what", 10);
  ASSERT_EQ(::send(pair_[1], nonsense.data(), nonsense.size(), MSG_NOSIGNAL), 10);
  EXPECT_EQ(dialing_->shake_hands(), errc::authentication_failed);
  EXPECT_EQ(std::memcmp(dialing_->first_received().data(), nonsense.data(), 8), 0);
}

TEST_F(TlsStreamTest, WhoAnswersWithACertificateInsteadOfTheKeyIsNotBelieved) {
  const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(EVP_EC_gen("P-256"), &EVP_PKEY_free);
  const std::unique_ptr<X509, decltype(&X509_free)> certificate(X509_new(), &X509_free);
  ASSERT_TRUE(key && certificate);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key.get());
  ASSERT_GT(X509_sign(certificate.get(), key.get(), EVP_sha256()), 0);
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_server_method()), &SSL_CTX_free);
  ASSERT_EQ(SSL_CTX_use_certificate(context.get(), certificate.get()), 1);
  ASSERT_EQ(SSL_CTX_use_PrivateKey(context.get(), key.get()), 1);
  const std::unique_ptr<SSL, decltype(&SSL_free)> impostor(SSL_new(context.get()), &SSL_free);
  SSL_set_fd(impostor.get(), pair_[1]);

  dialing_ = TlsContext::create()->dial(pair_[0], random_tls_key());
  EXPECT_EQ(dialing_->shake_hands(), asio::error::would_block);
  const int accepted = SSL_accept(impostor.get());
  EXPECT_EQ(SSL_get_error(impostor.get(), accepted), SSL_ERROR_WANT_READ) << "it has shown its certificate, and waits";
  EXPECT_EQ(dialing_->shake_hands(), errc::authentication_failed);
  EXPECT_FALSE(dialing_->shaken());
}

TEST_F(TlsStreamTest, AnOrderlyEndAndACutDiffer) {
  const TlsKey key = random_tls_key();
  ASSERT_FALSE(shake_hands(key, key).second);
  Bytes buffer(100);
  std::array pieces{iovec{buffer.data(), 10}};
  ASSERT_EQ(dialing_->send(pieces), 10);
  dialing_->end();
  EXPECT_EQ(accepting_->receive(buffer), 10);
  EXPECT_EQ(accepting_->receive(buffer), 0);
  EXPECT_TRUE(accepting_->has_more());

  ::shutdown(pair_[1], SHUT_RDWR);
  EXPECT_EQ(dialing_->receive(buffer), -1);
  EXPECT_EQ(errno, EPROTO) << "the other side has not said that it ends";
  EXPECT_EQ(dialing_->receive(buffer), -1);
  EXPECT_EQ(errno, EPROTO);
}

TEST_F(TlsStreamTest, AChangedRecordIsNeverReceived) {
  const TlsKey key = random_tls_key();
  ASSERT_FALSE(shake_hands(key, key).second);
  // A record goes through a third pair of hands.
  Bytes said = random_bytes(100, 1);
  std::array pieces{iovec{said.data(), said.size()}};
  ASSERT_EQ(dialing_->send(pieces), 100);
  Bytes record(1000);
  const ssize_t size = ::recv(pair_[1], record.data(), record.size(), 0);
  ASSERT_GT(size, 100);
  record[50] ^= std::byte{1};
  ASSERT_EQ(::send(pair_[0], record.data(), static_cast<std::size_t>(size), MSG_NOSIGNAL), size);
  Bytes heard(100);
  EXPECT_EQ(accepting_->receive(heard), -1);
  EXPECT_EQ(errno, EBADMSG);
  EXPECT_EQ(heard, Bytes(100));
  EXPECT_EQ(accepting_->send(pieces), -1) << "what failed stays failed";
  EXPECT_EQ(errno, EBADMSG);
}

TEST_F(TlsStreamTest, AnOpeningIsRecognisedBeforeAnythingIsSetAside) {
  const auto context = TlsContext::create();
  dialing_ = context->dial(pair_[0], random_tls_key());
  ASSERT_EQ(dialing_->shake_hands(), asio::error::would_block);
  Bytes opening(4096);
  opening.resize(static_cast<std::size_t>(::recv(pair_[1], opening.data(), opening.size(), 0)));
  std::size_t length = 0;
  for (std::size_t i = 0; i < opening.size(); ++i) {
    ASSERT_EQ(look_at_tls_opening(std::span(opening).first(i), length), TlsOpening::incomplete) << i;
    ASSERT_GT(length, i);
    ASSERT_LE(length, opening.size());
  }
  EXPECT_EQ(look_at_tls_opening(opening, length), TlsOpening::whole);
  EXPECT_EQ(length, opening.size());
  EXPECT_LE(length, max_tls_opening);
  const auto changed = [&](std::size_t at, int to) {
    Bytes bytes = opening;
    bytes[at] = static_cast<std::byte>(to);
    return look_at_tls_opening(bytes, length);
  };
  EXPECT_EQ(changed(0, 23), TlsOpening::none) << "no handshake";
  EXPECT_EQ(changed(1, 2), TlsOpening::none) << "an older protocol";
  EXPECT_EQ(changed(3, 64), TlsOpening::none) << "a record of 16 KiB";
  EXPECT_EQ(changed(5, 2), TlsOpening::none) << "another message";
  EXPECT_EQ(changed(6, 1), TlsOpening::none) << "a message of 64 KiB";
}

}  // namespace
}  // namespace kvferry::tcp
