// SPDX-License-Identifier: Apache-2.0
// One end of TLS, against a peer that has the key and does with it what no kvferry does; and in a process that uses
// OpenSSL itself.
#include <kvferry/tcp/tls_stream.hpp>

#include <gtest/gtest.h>

#include <asio/error.hpp>

#include <openssl/conf.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/ssl.h>

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/tcp/tls_socket.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using Bytes = std::vector<std::byte>;

/// OpenSSL gets no memory on this thread.
thread_local bool memory_used_up = false;

void* allocate(std::size_t size, const char*, int) { return memory_used_up ? nullptr : std::malloc(size); }
void* reallocate(void* memory, std::size_t size, const char*, int) {
  return memory_used_up ? nullptr : std::realloc(memory, size);
}
void release(void* memory, const char*, int) { std::free(memory); }

/// Before OpenSSL has any.
const bool memory_is_ours = CRYPTO_set_mem_functions(&allocate, &reallocate, &release) == 1;

/// OpenSSL as it is, with the key.
class OtherPeer {
 public:
  OtherPeer(int descriptor, const TlsKey& key, bool dials)
      : key_(key), context_(SSL_CTX_new(TLS_method()), &SSL_CTX_free), ssl_(SSL_new(context_.get()), &SSL_free) {
    SSL_set_min_proto_version(ssl(), TLS1_3_VERSION);
    SSL_set_app_data(ssl(), this);
    SSL_set_fd(ssl(), descriptor);
    SSL_set_psk_use_session_callback(
        ssl(), [](SSL* ssl, const EVP_MD*, const unsigned char** identity, std::size_t* size, SSL_SESSION** session) {
          const OtherPeer& self = of(ssl);
          *identity = reinterpret_cast<const unsigned char*>(self.key_.identity.data());
          *size = self.key_.identity.size();
          *session = self.session();
          return 1;
        });
    SSL_set_psk_find_session_callback(ssl(), [](SSL* ssl, const unsigned char*, std::size_t, SSL_SESSION** session) {
      *session = of(ssl).session();
      return 1;
    });
    if (dials) {
      SSL_set_connect_state(ssl());
    } else {
      SSL_set_accept_state(ssl());
    }
  }

  [[nodiscard]] SSL* ssl() const { return ssl_.get(); }

 private:
  static OtherPeer& of(const SSL* ssl) { return *static_cast<OtherPeer*>(SSL_get_app_data(ssl)); }

  [[nodiscard]] SSL_SESSION* session() const {
    constexpr std::array<unsigned char, 2> suite{0x13, 0x01};
    SSL_SESSION* const session = SSL_SESSION_new();
    SSL_SESSION_set1_master_key(session, reinterpret_cast<const unsigned char*>(key_.secret.data()),
                                key_.secret.size());
    SSL_SESSION_set_cipher(session, SSL_CIPHER_find(ssl(), suite.data()));
    SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION);
    return session;
  }

  const TlsKey key_;
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context_;
  const std::unique_ptr<SSL, decltype(&SSL_free)> ssl_;
};

class TlsPeerTest : public ::testing::Test {
 protected:
  TlsPeerTest() { EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair_.data()), 0); }
  ~TlsPeerTest() override {
    memory_used_up = false;
    stream_.reset();
    second_.reset();
    other_.reset();
    for (const int descriptor : pair_) {
      ::close(descriptor);
    }
  }

  /// A stream of this project's, and OpenSSL at the other end.
  void meet(bool stream_dials) {
    make(stream_dials);
    other_ = std::make_unique<OtherPeer>(pair_[1], key_, !stream_dials);
    for (int i = 0; i < 4 && !stream_->shaken(); ++i) {
      (void)SSL_do_handshake(other_->ssl());
      const auto ec = stream_->shake_hands();
      ASSERT_TRUE(!ec || ec == asio::error::would_block) << ec.message();
    }
    ASSERT_EQ(SSL_do_handshake(other_->ssl()), 1);
    ASSERT_TRUE(stream_->shaken());
  }

  /// Two streams of this project's, of which the first dials.
  void meet_alike() {
    make(true);
    second_ = context_->accept(pair_[1], {}, [this](std::span<const std::byte>) { return std::optional(key_); });
    EXPECT_EQ(stream_->shake_hands(), asio::error::would_block);
    EXPECT_EQ(second_->shake_hands(), asio::error::would_block);
    ASSERT_FALSE(stream_->shake_hands());
    ASSERT_FALSE(second_->shake_hands());
  }

  void make(bool dials) {
    stream_ = dials
                  ? context_->dial(pair_[0], key_)
                  : context_->accept(pair_[0], {}, [this](std::span<const std::byte>) { return std::optional(key_); });
  }

  static ssize_t say(TlsStream& stream, Bytes& bytes) {
    const std::array pieces{iovec{bytes.data(), bytes.size()}};
    return stream.send(pieces);
  }

  void expect_failed(int error) {
    Bytes buffer(100);
    EXPECT_EQ(stream_->receive(buffer), -1);
    EXPECT_EQ(errno, error);
    EXPECT_TRUE(stream_->has_more());
    EXPECT_EQ(say(*stream_, buffer), -1) << "what failed stays failed";
    EXPECT_EQ(errno, error);
  }

  const TlsKey key_ = random_tls_key();
  const std::shared_ptr<TlsContext> context_ = TlsContext::create();
  std::array<int, 2> pair_{-1, -1};
  std::unique_ptr<TlsStream> stream_;
  std::unique_ptr<TlsStream> second_;
  std::unique_ptr<OtherPeer> other_;
};

TEST_F(TlsPeerTest, AFloodOfNewKeysEndsTheConnection) {
  meet(false);
  int sent = 0;
  while (SSL_key_update(other_->ssl(), SSL_KEY_UPDATE_NOT_REQUESTED) == 1 && SSL_do_handshake(other_->ssl()) == 1) {
    ++sent;
  }
  EXPECT_GT(sent, 10);
  expect_failed(EBADMSG);
}

TEST_F(TlsPeerTest, WhoAsksForNewKeysGetsNoAnswers) {
  meet(false);
  while (SSL_key_update(other_->ssl(), SSL_KEY_UPDATE_REQUESTED) == 1 && SSL_do_handshake(other_->ssl()) == 1) {
  }
  expect_failed(EBADMSG);
  EXPECT_FALSE(stream_->holds_back());
  Bytes answer(100);
  EXPECT_EQ(::recv(pair_[1], answer.data(), answer.size(), MSG_DONTWAIT), -1);
}

TEST_F(TlsPeerTest, TicketsEndTheConnection) {
  meet(true);
  expect_failed(EBADMSG);  // OpenSSL sends two by itself
}

TEST_F(TlsPeerTest, ANewKeyAfterManyRecordsIsTaken) {
  meet(false);
  Bytes said(10, std::byte{7});
  Bytes heard(100);
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 1024; ++i) {
      ASSERT_EQ(SSL_write(other_->ssl(), said.data(), 10), 10);
      ASSERT_EQ(stream_->receive(heard), 10);
    }
    ASSERT_EQ(SSL_key_update(other_->ssl(), SSL_KEY_UPDATE_NOT_REQUESTED), 1);
    ASSERT_EQ(SSL_do_handshake(other_->ssl()), 1);
  }
  ASSERT_EQ(SSL_write(other_->ssl(), said.data(), 10), 10);
  EXPECT_EQ(stream_->receive(heard), 10);
}

TEST_F(TlsPeerTest, OneCallTakesNoMoreThanSomeOfManySmallRecords) {
  meet(false);
  BIO* const out = BIO_new(BIO_s_mem());
  SSL_set0_wbio(other_->ssl(), out);
  constexpr std::size_t records = 8000;
  Bytes said(records);
  for (std::size_t i = 0; i < records; ++i) {
    said[i] = static_cast<std::byte>(i * 7);
    ASSERT_EQ(SSL_write(other_->ssl(), &said[i], 1), 1);
  }
  char* encrypted = nullptr;
  const long size = BIO_get_mem_data(out, &encrypted);
  ASSERT_EQ(::send(pair_[1], encrypted, static_cast<std::size_t>(size), MSG_NOSIGNAL), size);
  TlsSocket socket(::dup(pair_[0]), std::move(stream_));
  constexpr std::size_t piece = 10;
  Bytes heard(records);
  std::size_t total = 0;
  for (int call = 0; total < records; ++call) {
    const std::uint64_t before = socket.records();
    const std::size_t left = records - total;
    ssize_t part = 0;
    if (call % 3 == 0) {  // to one piece of memory
      std::array pieces{iovec{heard.data() + total, left}};
      part = socket.receive(pieces);
    } else if (call % 3 == 1) {  // to many
      std::vector<iovec> pieces;
      for (std::size_t at = total; at < records; at += piece) {
        pieces.push_back({heard.data() + at, std::min(piece, records - at)});
      }
      part = socket.receive(pieces);
    } else {
      part = socket.discard(left);
      std::copy_n(said.begin() + static_cast<std::ptrdiff_t>(total), part,
                  heard.begin() + static_cast<std::ptrdiff_t>(total));
    }
    ASSERT_GT(part, 0);
    EXPECT_EQ(socket.records() - before, static_cast<std::uint64_t>(part));
    EXPECT_LT(part, 1024 + static_cast<ssize_t>(piece)) << call;
    total += static_cast<std::size_t>(part);
    // The rest is in OpenSSL's buffers: no event tells of it.
    ASSERT_TRUE(socket.over() || total == records) << call;
  }
  EXPECT_EQ(heard, said);
  std::array pieces{iovec{heard.data(), 1}};
  EXPECT_EQ(socket.receive(pieces), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_FALSE(socket.over());
}

TEST_F(TlsPeerTest, TheProgramsOwnListOfErrorsStaysAsItWasAndDecidesNothing) {
  ERR_clear_error();
  ERR_raise_data(ERR_LIB_USER, 7, "the program's own");
  const unsigned long own = ERR_peek_error();
  meet_alike();
  Bytes said(100, std::byte{1});
  Bytes heard(100);
  EXPECT_EQ(stream_->receive(heard), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(say(*stream_, said), 100);
  EXPECT_EQ(second_->receive(heard), 100);
  EXPECT_EQ(second_->receive(heard), -1);
  EXPECT_EQ(errno, EAGAIN);
  // And where something fails.
  const Bytes nonsense(100, std::byte{23});
  ASSERT_EQ(::send(pair_[1], nonsense.data(), nonsense.size(), MSG_NOSIGNAL), 100);
  expect_failed(EBADMSG);
  stream_->end();
  second_->end();
  stream_.reset();
  second_.reset();
  const char* text = nullptr;
  int flags = 0;
  EXPECT_EQ(ERR_get_error_all(nullptr, nullptr, nullptr, &text, &flags), own);
  EXPECT_STREQ(text, "the program's own");
  EXPECT_EQ(ERR_get_error(), 0U);
}

TEST_F(TlsPeerTest, MemoryThatIsUsedUpIsNotAnAttack) {
  ASSERT_TRUE(memory_is_ours);
  for (const bool sending : {true, false}) {
    meet_alike();
    Bytes bytes(100);
    ASSERT_EQ(say(*second_, bytes), 100);
    memory_used_up = true;
    EXPECT_EQ(sending ? say(*stream_, bytes) : stream_->receive(bytes), -1);
    EXPECT_EQ(errno, ENOMEM) << sending;
    memory_used_up = false;
    // With anything between them.
    stream_.reset();
    second_.reset();
    Bytes rest(1000);
    for (const int descriptor : pair_) {
      while (::recv(descriptor, rest.data(), rest.size(), MSG_DONTWAIT) > 0) {
      }
    }
  }
  make(true);
  memory_used_up = true;
  EXPECT_EQ(stream_->shake_hands(), errc::resource_limit);
}

TEST_F(TlsPeerTest, AnyNumberOfContextsTakesOneTypeOfBio) {
  const int before = BIO_get_new_index();
  for (int i = 0; i < 10; ++i) {
    (void)TlsContext::create();
  }
  EXPECT_EQ(BIO_get_new_index(), before + 1);
}

TEST_F(TlsPeerTest, TheSystemsConfigurationChangesNothing) {
  const std::string path = ::testing::TempDir() + "kvferry-openssl-" + std::to_string(::getpid()) + ".cnf";
  std::ofstream(path) << "openssl_conf = whole\n[whole]\nssl_conf = parts\n[parts]\nsystem_default = of_all\n[of_all]\n"
                         "Options = AllowNoDHEKEX, IgnoreUnexpectedEOF\nRecordPadding = 4096\nMaxProtocol = TLSv1.2\n";
  ASSERT_EQ(CONF_modules_load_file(path.c_str(), nullptr, 0), 1);
  ::unlink(path.c_str());
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> configured(SSL_CTX_new(TLS_method()), &SSL_CTX_free);
  EXPECT_NE(SSL_CTX_get_options(configured.get()) & SSL_OP_ALLOW_NO_DHE_KEX, 0U) << "it is in force";
  const auto context = TlsContext::create();
  CONF_modules_unload(1);
  stream_ = context->dial(pair_[0], key_);
  second_ = context->accept(pair_[1], {}, [this](std::span<const std::byte>) { return std::optional(key_); });
  EXPECT_EQ(stream_->shake_hands(), asio::error::would_block);
  EXPECT_EQ(second_->shake_hands(), asio::error::would_block);
  ASSERT_FALSE(stream_->shake_hands());
  ASSERT_FALSE(second_->shake_hands());
  Bytes bytes(100);
  ASSERT_EQ(say(*stream_, bytes), 100);
  Bytes record(5000);
  ssize_t size = ::recv(pair_[1], record.data(), record.size(), MSG_PEEK);
  // The dialing side's last words in its handshake come before it.
  EXPECT_LT(size, 300) << "padded";
  EXPECT_EQ(second_->receive(bytes), 100);
  // A cut within a record.
  ASSERT_EQ(say(*stream_, bytes), 100);
  size = ::recv(pair_[1], record.data(), record.size(), 0);
  ASSERT_GT(size, 100);
  ASSERT_EQ(::send(pair_[0], record.data(), 50, MSG_NOSIGNAL), 50);
  ::shutdown(pair_[0], SHUT_WR);
  EXPECT_EQ(second_->receive(bytes), -1);
  EXPECT_EQ(errno, EPROTO);
}

}  // namespace
}  // namespace kvferry::tcp
