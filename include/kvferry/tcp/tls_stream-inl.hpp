// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/tls_stream.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

#include <asio/error.hpp>

#include <sys/socket.h>
#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE TlsKey random_tls_key() {
  TlsKey key;
  key.identity = random_secret();
  for (const std::size_t half : {0U, 1U}) {
    make_secret(std::span(key.secret).subspan(half * secret_bytes).first<secret_bytes>());
  }
  return key;
}

/// A record of type 22 (RFC 8446, 5.1) with one whole message of type 1 (4.1.2) in it.
KVFERRY_INLINE TlsOpening look_at_tls_opening(std::span<const std::byte> bytes, std::size_t& length) noexcept {
  constexpr std::size_t record_header = 5;
  constexpr std::size_t headers = record_header + 4;
  const auto byte = [bytes](std::size_t i) { return std::to_integer<std::size_t>(bytes[i]); };
  length = headers;
  if ((!bytes.empty() && byte(0) != 22) || (bytes.size() > 1 && byte(1) != 3)) {
    return TlsOpening::none;
  }
  if (bytes.size() < headers) {
    return TlsOpening::incomplete;
  }
  length = record_header + (byte(3) << 8) + byte(4);
  const std::size_t message = (byte(6) << 16) + (byte(7) << 8) + byte(8);
  if (byte(5) != 1 || length > max_tls_opening || headers + message != length) {
    return TlsOpening::none;
  }
  return bytes.size() < length ? TlsOpening::incomplete : TlsOpening::whole;
}

#if !KVFERRY_WITH_TLS

KVFERRY_INLINE std::shared_ptr<TlsContext> TlsContext::create(std::uint64_t) {
  throw TransferError(errc::not_supported, "TcpOptions::encryption: this kvferry was built without OpenSSL");
}

#else

inline namespace internal {

inline constexpr std::size_t tls_record = SSL3_RT_MAX_PLAIN_LENGTH;
/// What a record adds: header, type and tag.
inline constexpr std::size_t tls_record_overhead = SSL3_RT_HEADER_LENGTH + 1 + 16;
/// Encrypted bytes in one call that receives.
inline constexpr std::size_t tls_read_bytes = std::size_t{64} << 10;

/// ChaCha20 is the faster one where the CPU has no instructions for AES.
KVFERRY_INLINE bool cpu_has_aes() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("aes") != 0;
#elif defined(__aarch64__)
  return (::getauxval(AT_HWCAP) & HWCAP_AES) != 0;
#else
  return false;
#endif
}

/// What OpenSSL says about the last failure. Its list is each thread's own.
KVFERRY_INLINE std::string tls_reason() {
  const char* const reason = ERR_reason_error_string(ERR_peek_last_error());
  return reason == nullptr ? "unknown error" : reason;
}

class OpenSslContext final : public TlsContext, public std::enable_shared_from_this<OpenSslContext> {
 public:
  explicit OpenSslContext(std::uint64_t records_per_key);
  ~OpenSslContext() override {
    SSL_CTX_free(context_);
    BIO_meth_free(socket_);
  }
  OpenSslContext(const OpenSslContext&) = delete;
  OpenSslContext& operator=(const OpenSslContext&) = delete;

  [[nodiscard]] std::unique_ptr<TlsStream> dial(int descriptor, const TlsKey& key) override;
  [[nodiscard]] std::unique_ptr<TlsStream> accept(int descriptor, std::span<const std::byte> opening,
                                                  FindKey find) override;

  [[nodiscard]] SSL_CTX* context() const noexcept { return context_; }
  [[nodiscard]] const BIO_METHOD* socket() const noexcept { return socket_; }
  [[nodiscard]] std::uint64_t records_per_key() const noexcept { return records_per_key_; }

 private:
  const std::uint64_t records_per_key_;
  SSL_CTX* context_ = nullptr;
  BIO_METHOD* socket_ = nullptr;
};

/// OpenSSL's own BIO for sockets would raise SIGPIPE in a caller's thread and send each record by a call of its own, and with
/// bytes that it couldn't write an `SSL_write` has to be repeated with the same ones, which the lane may have dropped by then.
/// So what is encrypted goes to a buffer here, and from there to the socket.
class OpenSslStream final : public TlsStream {
 public:
  OpenSslStream(std::shared_ptr<OpenSslContext> context, int descriptor);
  ~OpenSslStream() override {
    SSL_free(ssl_);
    OPENSSL_cleanse(key_.secret.data(), key_.secret.size());
  }
  OpenSslStream(const OpenSslStream&) = delete;
  OpenSslStream& operator=(const OpenSslStream&) = delete;

  void dial(const TlsKey& key) {
    key_ = key;
    SSL_set_connect_state(ssl_);
    // Without the key the peer would have to show a certificate, and there is none that counts.
    SSL_set_verify(ssl_, SSL_VERIFY_PEER, nullptr);
  }
  void accept(std::span<const std::byte> opening, TlsContext::FindKey find) {
    given_.assign(opening.begin(), opening.end());
    find_ = std::move(find);
    SSL_set_accept_state(ssl_);
  }

  [[nodiscard]] std::error_code shake_hands() override;
  [[nodiscard]] bool shaken() const noexcept override { return shaken_; }
  [[nodiscard]] const std::array<std::byte, 16>& identity() const noexcept override { return key_.identity; }
  [[nodiscard]] std::span<const std::byte> first_received() const noexcept override {
    return std::span(first_).first(first_count_);
  }
  [[nodiscard]] ssize_t send(std::span<const iovec> pieces) override;
  [[nodiscard]] ssize_t flush() noexcept override;
  [[nodiscard]] bool holds_back() const noexcept override { return begin_ != encrypted_.size(); }
  [[nodiscard]] ssize_t receive(std::span<std::byte> to) override;
  [[nodiscard]] bool over() const noexcept override { return over_; }
  void end() noexcept override;
  [[nodiscard]] std::string description() const override;

  /// @name What OpenSSL calls
  /// @{
  static int write_bio(BIO* bio, const char* data, int size);
  static int read_bio(BIO* bio, char* data, int size);
  static long control_bio(BIO* bio, int command, long, void*);
  static int use_key(SSL* ssl, const EVP_MD* digest, const unsigned char** identity, std::size_t* size,
                     SSL_SESSION** session);
  static int find_key(SSL* ssl, const unsigned char* identity, std::size_t size, SSL_SESSION** session);
  /// @}

 private:
  [[nodiscard]] static OpenSslStream& of(const SSL* ssl) { return *static_cast<OpenSslStream*>(SSL_get_app_data(ssl)); }
  [[nodiscard]] static OpenSslStream& of(BIO* bio) { return *static_cast<OpenSslStream*>(BIO_get_data(bio)); }
  [[nodiscard]] SSL_SESSION* session() const;
  [[nodiscard]] ssize_t take(std::span<std::byte> to) noexcept;
  [[nodiscard]] bool encrypt(const void* data, std::size_t size);
  [[nodiscard]] int cause_of_failure() const noexcept;
  void forget_key() noexcept {
    OPENSSL_cleanse(key_.secret.data(), key_.secret.size());
    find_ = {};
  }

  const std::shared_ptr<OpenSslContext> context_;
  const int descriptor_;
  SSL* const ssl_;
  TlsKey key_;
  TlsContext::FindKey find_;
  std::vector<std::byte> given_;  ///< Bytes that were received outside of OpenSSL, and of them ...
  std::size_t taken_ = 0;         ///< ... these many are in it by now.
  std::array<std::byte, 8> first_{};
  std::size_t first_count_ = 0;
  std::vector<std::byte> encrypted_;  ///< And what the socket has taken of it.
  std::size_t begin_ = 0;
  std::uint64_t records_ = 0;  ///< With the key of now.
  bool shaken_ = false;
  bool drained_ = false;  ///< Nothing of a record is inside OpenSSL.
  bool ended_ = false;    ///< The socket's bytes have.
  bool over_ = false;
  int socket_error_ = 0;  ///< An errno.
  int failure_ = 0;       ///< The same, of all later calls.
};

KVFERRY_INLINE OpenSslContext::OpenSslContext(std::uint64_t records_per_key) : records_per_key_(records_per_key) {
  // Its threads may still be at work when the process exits.
  OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, nullptr);
  ERR_clear_error();
  context_ = SSL_CTX_new(TLS_method());
  socket_ = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "kvferry");
  // One hash for all of them, as a key goes with one.
  const char* const suites = cpu_has_aes() ? "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
                                           : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256";
  if (context_ == nullptr || socket_ == nullptr || SSL_CTX_set_min_proto_version(context_, TLS1_3_VERSION) != 1 ||
      SSL_CTX_set_max_proto_version(context_, TLS1_3_VERSION) != 1 || SSL_CTX_set_ciphersuites(context_, suites) != 1 ||
      SSL_CTX_set1_groups_list(context_, "X25519") != 1) {
    const std::string why = tls_reason();
    SSL_CTX_free(context_);
    BIO_meth_free(socket_);
    throw TransferError(errc::not_supported, "TcpOptions::encryption: OpenSSL can't do TLS 1.3: " + why);
  }
  BIO_meth_set_write(socket_, &OpenSslStream::write_bio);
  BIO_meth_set_read(socket_, &OpenSslStream::read_bio);
  BIO_meth_set_ctrl(socket_, &OpenSslStream::control_bio);
  // Whichever side has no instructions for AES gets ChaCha20. Nothing is resumed: a new connection has a new key.
  SSL_CTX_set_options(context_, SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_PRIORITIZE_CHACHA | SSL_OP_NO_TICKET);
  SSL_CTX_set_num_tickets(context_, 0);
  SSL_CTX_set_session_cache_mode(context_, SSL_SESS_CACHE_OFF);
  // An idle connection keeps no buffers.
  SSL_CTX_set_mode(context_, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_read_ahead(context_, 1);
  SSL_CTX_set_default_read_buffer_len(context_, tls_read_bytes);
  SSL_CTX_set_psk_use_session_callback(context_, &OpenSslStream::use_key);
  SSL_CTX_set_psk_find_session_callback(context_, &OpenSslStream::find_key);
}

KVFERRY_INLINE std::unique_ptr<TlsStream> OpenSslContext::dial(int descriptor, const TlsKey& key) {
  auto stream = std::make_unique<OpenSslStream>(shared_from_this(), descriptor);
  stream->dial(key);
  return stream;
}

KVFERRY_INLINE std::unique_ptr<TlsStream> OpenSslContext::accept(int descriptor, std::span<const std::byte> opening,
                                                                 FindKey find) {
  auto stream = std::make_unique<OpenSslStream>(shared_from_this(), descriptor);
  stream->accept(opening, std::move(find));
  return stream;
}

KVFERRY_INLINE OpenSslStream::OpenSslStream(std::shared_ptr<OpenSslContext> context, int descriptor)
    : context_(std::move(context)), descriptor_(descriptor), ssl_(SSL_new(context_->context())) {
  BIO* const bio = ssl_ == nullptr ? nullptr : BIO_new(context_->socket());
  if (bio == nullptr) {
    SSL_free(ssl_);
    throw std::bad_alloc();
  }
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_, bio, bio);
  SSL_set_app_data(ssl_, this);
}

KVFERRY_INLINE int OpenSslStream::write_bio(BIO* bio, const char* data, int size) {
  auto& encrypted = of(bio).encrypted_;
  const auto* const bytes = reinterpret_cast<const std::byte*>(data);
  try {
    encrypted.insert(encrypted.end(), bytes, bytes + size);
    return size;
  } catch (const std::exception&) {
    return -1;
  }
}

KVFERRY_INLINE int OpenSslStream::read_bio(BIO* bio, char* data, int size) {
  BIO_clear_retry_flags(bio);
  const ssize_t received = of(bio).take({reinterpret_cast<std::byte*>(data), static_cast<std::size_t>(size)});
  if (received < 0 && errno == EAGAIN) {
    BIO_set_retry_read(bio);
  }
  return static_cast<int>(received);
}

KVFERRY_INLINE long OpenSslStream::control_bio(BIO* bio, int command, long, void*) {
  if (command == BIO_CTRL_EOF) {
    return of(bio).ended_ ? 1 : 0;
  }
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

/// As recv(2).
KVFERRY_INLINE ssize_t OpenSslStream::take(std::span<std::byte> to) noexcept {
  if (taken_ != given_.size()) {
    const std::size_t count = std::min(to.size(), given_.size() - taken_);
    std::memcpy(to.data(), given_.data() + taken_, count);
    taken_ += count;
    if (taken_ == given_.size()) {
      given_.clear();
      taken_ = 0;
    }
    return static_cast<ssize_t>(count);
  }
  ssize_t received = 0;
  do {
    received = ::recv(descriptor_, to.data(), to.size(), MSG_DONTWAIT);
  } while (received < 0 && errno == EINTR);
  if (received < 0 && errno != EAGAIN) {
    socket_error_ = errno;
  }
  ended_ = ended_ || received == 0;
  for (ssize_t i = 0; i < received && first_count_ < first_.size(); ++i) {
    first_[first_count_++] = to[static_cast<std::size_t>(i)];
  }
  return received;
}

KVFERRY_INLINE SSL_SESSION* OpenSslStream::session() const {
  constexpr std::array<unsigned char, 2> any_of_its_hash{0x13, 0x01};
  SSL_SESSION* const session = SSL_SESSION_new();
  const SSL_CIPHER* const cipher = SSL_CIPHER_find(ssl_, any_of_its_hash.data());
  if (session == nullptr || cipher == nullptr ||
      SSL_SESSION_set1_master_key(session, reinterpret_cast<const unsigned char*>(key_.secret.data()),
                                  key_.secret.size()) != 1 ||
      SSL_SESSION_set_cipher(session, cipher) != 1 || SSL_SESSION_set_protocol_version(session, TLS1_3_VERSION) != 1) {
    SSL_SESSION_free(session);
    return nullptr;
  }
  return session;
}

KVFERRY_INLINE int OpenSslStream::use_key(SSL* ssl, const EVP_MD*, const unsigned char** identity, std::size_t* size,
                                          SSL_SESSION** session) {
  OpenSslStream& self = of(ssl);
  *session = self.session();
  *identity = reinterpret_cast<const unsigned char*>(self.key_.identity.data());
  *size = self.key_.identity.size();
  return *session == nullptr ? 0 : 1;
}

KVFERRY_INLINE int OpenSslStream::find_key(SSL* ssl, const unsigned char* identity, std::size_t size,
                                           SSL_SESSION** session) {
  OpenSslStream& self = of(ssl);
  *session = nullptr;
  const auto key = self.find_ ? self.find_(std::as_bytes(std::span(identity, size))) : std::nullopt;
  if (!key) {
    return 1;  // none of this side's
  }
  self.key_ = *key;
  *session = self.session();
  return *session == nullptr ? 0 : 1;
}

KVFERRY_INLINE std::error_code OpenSslStream::shake_hands() {
  if (shaken_) {
    return {};
  }
  ERR_clear_error();
  const int result = SSL_do_handshake(ssl_);
  const bool waits = result != 1 && SSL_get_error(ssl_, result) == SSL_ERROR_WANT_READ;
  if (result != 1 && !waits) {
    // Who doesn't hold the key isn't told what was wrong with it.
    encrypted_.clear();
    begin_ = 0;
    forget_key();
    if (socket_error_ != 0) {
      return {socket_error_, std::system_category()};
    }
    return ended_ ? asio::error::make_error_code(asio::error::eof) : make_error_code(errc::authentication_failed);
  }
  // The first bytes of a connection always fit its send buffer.
  if (flush() != 0 && errno != EAGAIN) {
    return {errno, std::system_category()};
  }
  if (waits) {
    return asio::error::would_block;
  }
  forget_key();
  if (SSL_session_reused(ssl_) != 1) {
    return errc::authentication_failed;  // not by the key
  }
  shaken_ = true;
  return {};
}

KVFERRY_INLINE bool OpenSslStream::encrypt(const void* data, std::size_t size) {
  if (records_ == context_->records_per_key()) {
    records_ = 0;
    if (SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED) != 1) {
      return false;
    }
  }
  ++records_;
  std::size_t written = 0;
  return SSL_write_ex(ssl_, data, size, &written) == 1 && written == size;
}

/// A record is encrypted from where it lies, if its bytes lie end to end; small pieces and what is left of large ones share
/// records, for which they are copied.
KVFERRY_INLINE ssize_t OpenSslStream::send(std::span<const iovec> pieces) {
  if (failure_ != 0) {
    errno = failure_;
    return -1;
  }
  std::size_t total = 0;
  for (const iovec& piece : pieces) {
    total += piece.iov_len;
  }
  // Here, where there may be no memory; OpenSSL couldn't go on. With room for a new key's announcement and an alert.
  encrypted_.reserve(encrypted_.size() + total + (total / tls_record + pieces.size() + 4) * tls_record_overhead + 128);
  ERR_clear_error();
  std::array<std::byte, tls_record> together;
  std::size_t gathered = 0;
  bool sound = true;
  for (const iovec& piece : pieces) {
    const auto* from = static_cast<const std::byte*>(piece.iov_base);
    std::size_t left = piece.iov_len;
    while (sound && left != 0) {
      if (gathered == 0 && left >= tls_record) {
        sound = encrypt(from, tls_record);
        from += tls_record;
        left -= tls_record;
        continue;
      }
      const std::size_t part = std::min(left, tls_record - gathered);
      std::memcpy(together.data() + gathered, from, part);
      gathered += part;
      from += part;
      left -= part;
      if (gathered == tls_record) {
        sound = encrypt(together.data(), std::exchange(gathered, 0));
      }
    }
  }
  if (sound && gathered != 0) {
    sound = encrypt(together.data(), gathered);
  }
  if (!sound) {
    failure_ = errno = EBADMSG;
    return -1;
  }
  (void)flush();  // what stands in its way, the next call finds
  return static_cast<ssize_t>(total);
}

KVFERRY_INLINE ssize_t OpenSslStream::flush() noexcept {
  while (begin_ != encrypted_.size()) {
    const ssize_t sent =
        ::send(descriptor_, encrypted_.data() + begin_, encrypted_.size() - begin_, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent >= 0) {
      begin_ += static_cast<std::size_t>(sent);
    } else if (errno != EINTR) {
      return -1;
    }
  }
  constexpr std::size_t kept = 4096;
  if (encrypted_.capacity() > kept) {
    std::vector<std::byte>().swap(encrypted_);
  }
  encrypted_.clear();
  begin_ = 0;
  return 0;
}

KVFERRY_INLINE int OpenSslStream::cause_of_failure() const noexcept {
  return socket_error_ != 0 ? socket_error_ : ended_ ? EPROTO : EBADMSG;
}

KVFERRY_INLINE ssize_t OpenSslStream::receive(std::span<std::byte> to) {
  if (failure_ != 0) {
    errno = failure_;
    return -1;
  }
  if (drained_ && given_.empty()) {
    // Most looks find nothing, and that is cheaper found out without OpenSSL's buffers: the next record's header.
    std::array<std::byte, SSL3_RT_HEADER_LENGTH> header;
    const ssize_t received = take(header);
    if (received <= 0) {
      if (received == 0 || errno != EAGAIN) {
        failure_ = errno = cause_of_failure();
      }
      return -1;
    }
    given_.assign(header.begin(), header.begin() + received);
  }
  ERR_clear_error();
  drained_ = false;
  std::size_t filled = 0;
  while (filled < to.size()) {
    std::size_t received = 0;
    const int result = SSL_read_ex(ssl_, to.data() + filled, to.size() - filled, &received);
    if (result == 1) {
      filled += received;
      continue;
    }
    const int error = SSL_get_error(ssl_, result);
    if (error == SSL_ERROR_WANT_READ) {
      drained_ = SSL_has_pending(ssl_) == 0;
      if (filled == 0) {
        errno = EAGAIN;
        return -1;
      }
      return static_cast<ssize_t>(filled);
    }
    if (error == SSL_ERROR_ZERO_RETURN) {
      over_ = true;
      return static_cast<ssize_t>(filled);  // OpenSSL says so again
    }
    over_ = true;
    failure_ = cause_of_failure();
    if (filled == 0) {
      errno = failure_;
      return -1;
    }
    return static_cast<ssize_t>(filled);
  }
  return static_cast<ssize_t>(filled);
}

KVFERRY_INLINE void OpenSslStream::end() noexcept {
  if (shaken_ && failure_ == 0) {
    ERR_clear_error();
    SSL_shutdown(ssl_);
    (void)flush();
  }
}

KVFERRY_INLINE std::string OpenSslStream::description() const {
  const std::string_view suite = SSL_CIPHER_get_name(SSL_get_current_cipher(ssl_));
  return suite == "TLS_AES_128_GCM_SHA256" ? "TLS 1.3 AES-128-GCM" : "TLS 1.3 ChaCha20-Poly1305";
}

}  // namespace internal

KVFERRY_INLINE std::shared_ptr<TlsContext> TlsContext::create(std::uint64_t records_per_key) {
  return std::make_shared<OpenSslContext>(records_per_key);
}

#endif

}  // namespace kvferry::tcp
