// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/openssl_stream.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/ssl.h>

#include <asio/error.hpp>

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <new>
#include <string_view>
#include <utility>

#include <kvferry/detail/fetch_ahead.hpp>
#include <kvferry/error.hpp>
#include <kvferry/tcp/openssl_certificates-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

KVFERRY_INLINE OpenSslStream::OpenSslStream(std::shared_ptr<OpenSslContext> context, int descriptor)
    : context_(std::move(context)), descriptor_(descriptor), ssl_([this] {
        const OpenSslErrors errors;
        return SSL_new(context_->context());
      }()) {
  const OpenSslErrors errors;
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
  OpenSslStream& self = of(bio);
  const auto* const bytes = reinterpret_cast<const std::byte*>(data);
  if (self.failure_ != 0) {
    return -1;
  }
  try {
    self.encrypted_.insert(self.encrypted_.end(), bytes, bytes + size);
    return size;
  } catch (const std::exception&) {
    self.socket_error_ = ENOMEM;
    return -1;
  }
}

KVFERRY_INLINE int OpenSslStream::read_bio(BIO* bio, char* data, int size) {
  BIO_clear_retry_flags(bio);
  if (of(bio).failure_ != 0) {
    return -1;
  }
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

/// OpenSSL deals with messages that come after the handshake within a call that receives, and with any number of
/// them. A peer of this project's sends one, rarely; whoever sends others, or many, must not keep the thread at work
/// or have answers pile up.
KVFERRY_INLINE void OpenSslStream::see_message(int written, int, int type, const void* data, std::size_t size, SSL* ssl,
                                               void*) {
  OpenSslStream& self = of(ssl);
  const std::span bytes(static_cast<const unsigned char*>(data), size);
  if (written == 0 && type == SSL3_RT_ALERT && bytes.size() == 2) {
    self.alert_ = bytes[1];
  }
  if (written == 0 && type == SSL3_RT_HEADER) {
    ++self.records_in_;
  }
  if (written != 0 || !self.shaken_) {
    return;
  }
  if (type == SSL3_RT_INNER_CONTENT_TYPE && !bytes.empty() && bytes[0] == SSL3_RT_APPLICATION_DATA) {
    ++self.received_records_;
  } else if (type == SSL3_RT_HANDSHAKE) {
    const bool changes_key = bytes.size() == SSL3_HM_HEADER_LENGTH + 1 && bytes[0] == SSL3_MT_KEY_UPDATE &&
                             bytes[SSL3_HM_HEADER_LENGTH] == SSL_KEY_UPDATE_NOT_REQUESTED;
    const std::uint64_t least = std::min(least_records_per_key, self.context_->records_per_key());
    if (!changes_key || std::exchange(self.received_records_, 0) < least) {
      self.failure_ = EBADMSG;
    }
  }
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
  if (self.key_.certificates) {
    *session = nullptr;  // which offers none
    return 1;
  }
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
  if (!key || key->certificates) {
    return 1;  // none of this side's
  }
  self.key_ = *key;
  *session = self.session();
  return *session == nullptr ? 0 : 1;
}

KVFERRY_INLINE bool OpenSslStream::use_certificates() noexcept {
  const OpenSslErrors errors;
  return static_cast<const OpenSslCertificates&>(*key_.certificates).use(ssl_);
}

/// Says in the clear which handshake a connection with certificates is of, as a pre-shared key's identity does. The
/// accepting side learns by it what it is to show, and whom it is to ask for.
KVFERRY_INLINE int OpenSslStream::add_identity(SSL* ssl, unsigned, unsigned, const unsigned char** out,
                                               std::size_t* size, X509*, std::size_t, int*, void*) {
  const OpenSslStream& self = of(ssl);
  if (!self.key_.certificates) {
    return 0;
  }
  *out = reinterpret_cast<const unsigned char*>(self.key_.identity.data());
  *size = self.key_.identity.size();
  return 1;
}

/// A peer that names no awaited handshake is turned away before keys are agreed and before it sees a certificate.
KVFERRY_INLINE int OpenSslStream::see_opening(SSL* ssl, int* alert, void*) {
  OpenSslStream& self = of(ssl);
  const unsigned char* identity = nullptr;
  std::size_t size = 0;
  if (SSL_client_hello_get0_ext(ssl, identity_extension, &identity, &size) != 1) {
    return SSL_CLIENT_HELLO_SUCCESS;  // it has to have a pre-shared key, or nothing comes of it
  }
  const auto key = self.find_ ? self.find_(std::as_bytes(std::span(identity, size))) : std::nullopt;
  if (key && key->certificates) {
    self.key_ = *key;
    if (self.use_certificates()) {
      SSL_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
      return SSL_CLIENT_HELLO_SUCCESS;
    }
    self.socket_error_ = ENOMEM;
  }
  *alert = SSL_AD_HANDSHAKE_FAILURE;
  return SSL_CLIENT_HELLO_ERROR;
}

/// Only the certificate that the peer has told counts, and only if the CA vouches for it, too. OpenSSL sees to it that the
/// peer has its private key.
KVFERRY_INLINE int OpenSslStream::judge_certificate(X509_STORE_CTX* shown, void*) {
  OpenSslStream& self =
      of(static_cast<const SSL*>(X509_STORE_CTX_get_ex_data(shown, SSL_get_ex_data_X509_STORE_CTX_idx())));
  const X509* const certificate = X509_STORE_CTX_get0_cert(shown);
  try {
    if (!self.key_.certificates || certificate == nullptr) {
      X509_STORE_CTX_set_error(shown, X509_V_ERR_CERT_REJECTED);
      return 0;
    }
    const CertificateHash hash = hash_of(certificate);
    if (hash != self.key_.peers_certificate) {
      self.wrong_ = "it shows a certificate with SHA-256 " + in_digits(hash) + ", and has told of one with SHA-256 " +
                    in_digits(self.key_.peers_certificate) + " in the handshake";
      X509_STORE_CTX_set_error(shown, X509_V_ERR_CERT_REJECTED);
    } else if (X509_verify_cert(shown) == 1) {
      self.accepts_certificate_ = true;
      return 1;
    } else {
      const int depth = X509_STORE_CTX_get_error_depth(shown);
      const X509* const culprit = X509_STORE_CTX_get_current_cert(shown);
      self.wrong_ = "TcpOptions::certificates.trusted doesn't vouch for its certificate: " +
                    std::string(X509_verify_cert_error_string(X509_STORE_CTX_get_error(shown))) + ", at " +
                    text_of_now() + ": " + description_of(certificate);
      if (depth > 0 && culprit != nullptr) {
        self.wrong_ += "; because of " + description_of(culprit);
      }
    }
    self.refuses_certificate_ = true;
  } catch (const std::exception&) {
    self.socket_error_ = ENOMEM;
    X509_STORE_CTX_set_error(shown, X509_V_ERR_OUT_OF_MEM);
  }
  return 0;
}

KVFERRY_INLINE bool OpenSslStream::holds_what_was_told() const noexcept {
  const bool by_key = SSL_session_reused(ssl_) == 1;
  return key_.certificates ? accepts_certificate_ && !by_key && SSL_get_verify_result(ssl_) == X509_V_OK : by_key;
}

KVFERRY_INLINE std::string OpenSslStream::why() const {
  if (!wrong_.empty() || !key_.certificates || alert_ < 0) {
    return wrong_;
  }
  switch (alert_) {
    case SSL_AD_BAD_CERTIFICATE:
    case SSL_AD_UNSUPPORTED_CERTIFICATE:
    case SSL_AD_CERTIFICATE_REVOKED:
    case SSL_AD_CERTIFICATE_EXPIRED:
    case SSL_AD_CERTIFICATE_UNKNOWN:
    case SSL_AD_UNKNOWN_CA:
      return "it refuses this side's certificate (" + std::string(SSL_alert_desc_string_long(alert_)) +
             "; its log says more): " + key_.certificates->description();
    default: return {};
  }
}

KVFERRY_INLINE std::error_code OpenSslStream::shake_hands() {
  if (shaken_) {
    return {};
  }
  if (holds_back() && flush() != 0) {
    return errno == EAGAIN ? std::error_code(asio::error::would_block)
                           : std::error_code(errno, asio::error::get_system_category());
  }
  const OpenSslErrors errors;
  const int result = SSL_do_handshake(ssl_);
  const bool waits = result != 1 && SSL_get_error(ssl_, result) == SSL_ERROR_WANT_READ;
  if (result != 1 && !waits) {
    const int cause = refuses_certificate_ ? EBADMSG : cause_of_failure();
    if (refuses_certificate_) {
      // The peer knows a handshake's identity. Anybody else who knows it learns only that he is refused.
      (void)flush();
    }
    // A peer that doesn't hold the key isn't told what was wrong with it.
    encrypted_.clear();
    begin_ = 0;
    forget_key();
    switch (cause) {
      case ENOMEM: return errc::resource_limit;
      case EPROTO: return asio::error::eof;
      case EBADMSG: return errc::authentication_failed;
      default: return {cause, asio::error::get_system_category()};
    }
  }
  // But for certificates, the first bytes of a connection always fit its send buffer.
  if (flush() != 0 && errno != EAGAIN) {
    return {errno, asio::error::get_system_category()};
  }
  if (waits || holds_back()) {
    return asio::error::would_block;
  }
  forget_key();
  if (!holds_what_was_told()) {
    return errc::authentication_failed;
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

/// A record is encrypted from where it lies, if its bytes lie end to end; small pieces and what is left of large ones
/// share records, for which they are copied.
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
  const OpenSslErrors errors;
  std::array<std::byte, tls_record> together;
  std::size_t gathered = 0;
  bool sound = true;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (i + 1 != pieces.size()) {
      fetch_ahead(pieces[i + 1].iov_base, pieces[i + 1].iov_len);
    }
    const auto* from = static_cast<const std::byte*>(pieces[i].iov_base);
    std::size_t left = pieces[i].iov_len;
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
    failure_ = errno = OpenSslErrors::out_of_memory() ? ENOMEM : EIO;
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
  if (socket_error_ != 0) {
    return socket_error_;
  }
  if (OpenSslErrors::out_of_memory()) {
    return ENOMEM;
  }
  return ended_ ? EPROTO : EBADMSG;
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
        failure_ = errno = received == 0 ? EPROTO : socket_error_;
      }
      return -1;
    }
    given_.assign(header.begin(), header.begin() + received);
  }
  const OpenSslErrors errors;
  drained_ = false;
  more_ = false;
  const std::uint64_t enough = records_in_ + most_records_at_once;
  std::size_t filled = 0;
  while (filled < to.size()) {
    // Not of those that bring nothing: after a few dozen of these OpenSSL ends the connection itself.
    if (filled != 0 && records_in_ >= enough) {
      more_ = true;
      break;
    }
    std::size_t received = 0;
    const int result = SSL_read_ex(ssl_, to.data() + filled, to.size() - filled, &received);
    if (failure_ == 0 && result == 1) {
      filled += received;
      continue;
    }
    const int error = SSL_get_error(ssl_, result);
    if (failure_ == 0 && error == SSL_ERROR_WANT_READ) {
      drained_ = SSL_has_pending(ssl_) == 0;
      if (filled == 0) {
        errno = EAGAIN;
        return -1;
      }
      break;
    }
    more_ = true;
    if (failure_ == 0 && error == SSL_ERROR_ZERO_RETURN) {
      break;  // OpenSSL says so again
    }
    if (failure_ == 0) {
      failure_ = cause_of_failure();
    }
    if (filled == 0) {
      errno = failure_;
      return -1;
    }
    break;
  }
  return static_cast<ssize_t>(filled);
}

KVFERRY_INLINE void OpenSslStream::end() noexcept {
  if (shaken_ && failure_ == 0) {
    const OpenSslErrors errors;
    SSL_shutdown(ssl_);
    (void)flush();
  }
}

KVFERRY_INLINE std::string OpenSslStream::description() const {
  const std::string_view suite = SSL_CIPHER_get_name(SSL_get_current_cipher(ssl_));
  const std::string name = suite == "TLS_AES_128_GCM_SHA256" ? "TLS 1.3 AES-128-GCM" : "TLS 1.3 ChaCha20-Poly1305";
  return key_.certificates ? name + " with certificates" : name;
}

}  // namespace internal
}  // namespace kvferry::tcp

#endif
