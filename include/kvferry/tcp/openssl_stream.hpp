// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/tls_stream.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/bio.h>
#include <openssl/ssl.h>

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/tcp/openssl_certificates.hpp>
#include <kvferry/tcp/openssl_errors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

inline namespace internal {

inline constexpr std::size_t tls_record = SSL3_RT_MAX_PLAIN_LENGTH;
/// The bytes that a record adds: header, type and tag.
inline constexpr std::size_t tls_record_overhead = SSL3_RT_HEADER_LENGTH + 1 + 16;
/// Encrypted bytes in one call that receives.
inline constexpr std::size_t tls_read_bytes = std::size_t{64} << 10;

class OpenSslContext final : public TlsContext, public std::enable_shared_from_this<OpenSslContext> {
 public:
  explicit OpenSslContext(std::uint64_t records_per_key);

  [[nodiscard]] std::shared_ptr<const TlsCertificates> read_certificates(const CertificateFiles& files) override;
  [[nodiscard]] std::unique_ptr<TlsStream> dial(int descriptor, const TlsKey& key) override;
  [[nodiscard]] std::unique_ptr<TlsStream> accept(int descriptor, std::span<const std::byte> opening,
                                                  FindKey find) override;

  [[nodiscard]] SSL_CTX* context() const noexcept { return context_.get(); }
  [[nodiscard]] const BIO_METHOD* socket() const noexcept { return socket_; }
  [[nodiscard]] std::uint64_t records_per_key() const noexcept { return records_per_key_; }

 private:
  struct Free {
    void operator()(SSL_CTX* context) const noexcept { SSL_CTX_free(context); }
  };

  void set_up_certificates();

  const std::uint64_t records_per_key_;
  std::unique_ptr<SSL_CTX, Free> context_;
  const BIO_METHOD* socket_ = nullptr;
  std::once_flag certificates_set_up_;
};

/// The extension of a ClientHello that has a handshake's identity, where certificates are shown: a private one (RFC 8446, 11).
inline constexpr unsigned identity_extension = 0xff4b;

/// Records that there have to be between two changes of the peer's key: each costs several hashes.
inline constexpr std::uint64_t least_records_per_key = 1024;

/// OpenSSL's own BIO for sockets would raise SIGPIPE in a caller's thread and send each record by a call of its own,
/// and with bytes that it couldn't write an `SSL_write` has to be repeated with the same ones, which the lane may
/// have dropped by then. So what is encrypted goes to a buffer here, and from there to the socket.
class OpenSslStream final : public TlsStream {
 public:
  OpenSslStream(std::shared_ptr<OpenSslContext> context, int descriptor);
  ~OpenSslStream() override {
    const OpenSslErrors errors;
    SSL_free(ssl_);
  }
  OpenSslStream(const OpenSslStream&) = delete;
  OpenSslStream& operator=(const OpenSslStream&) = delete;

  void dial(const TlsKey& key) {
    key_ = key;
    SSL_set_connect_state(ssl_);
    // A peer without the key would have to show a certificate. Only the one that was told counts.
    SSL_set_verify(ssl_, SSL_VERIFY_PEER, nullptr);
    if (key_.certificates && !use_certificates()) {
      throw std::bad_alloc();
    }
  }
  void accept(std::span<const std::byte> opening, TlsContext::FindKey find) {
    given_.assign(opening.begin(), opening.end());
    find_ = std::move(find);
    SSL_set_accept_state(ssl_);
  }

  [[nodiscard]] std::error_code shake_hands() override;
  [[nodiscard]] bool shaken() const noexcept override { return shaken_; }
  [[nodiscard]] std::string why() const override;
  [[nodiscard]] bool refuses_certificate() const noexcept override { return refuses_certificate_; }
  [[nodiscard]] const std::array<std::byte, 16>& identity() const noexcept override { return key_.identity; }
  [[nodiscard]] std::span<const std::byte> first_received() const noexcept override {
    return std::span(first_).first(first_count_);
  }
  [[nodiscard]] ssize_t send(std::span<const iovec> pieces) override;
  [[nodiscard]] ssize_t flush() noexcept override;
  [[nodiscard]] bool holds_back() const noexcept override { return begin_ != encrypted_.size(); }
  [[nodiscard]] ssize_t receive(std::span<std::byte> to) override;
  [[nodiscard]] bool has_more() const noexcept override { return more_; }
  [[nodiscard]] std::uint64_t records() const noexcept override { return records_in_; }
  void end() noexcept override;
  [[nodiscard]] std::string description() const override;

  /// @name What OpenSSL calls
  /// @{
  static int write_bio(BIO* bio, const char* data, int size);
  static int read_bio(BIO* bio, char* data, int size);
  static long control_bio(BIO* bio, int command, long, void*);
  static void see_message(int written, int version, int type, const void* data, std::size_t size, SSL* ssl, void*);
  static int use_key(SSL* ssl, const EVP_MD* digest, const unsigned char** identity, std::size_t* size,
                     SSL_SESSION** session);
  static int find_key(SSL* ssl, const unsigned char* identity, std::size_t size, SSL_SESSION** session);
  static int add_identity(SSL* ssl, unsigned, unsigned, const unsigned char** out, std::size_t* size, X509*,
                          std::size_t, int*, void*);
  static int see_opening(SSL* ssl, int* alert, void*);
  static int judge_certificate(X509_STORE_CTX* shown, void*);
  /// @}

 private:
  [[nodiscard]] static OpenSslStream& of(const SSL* ssl) { return *static_cast<OpenSslStream*>(SSL_get_app_data(ssl)); }
  [[nodiscard]] static OpenSslStream& of(BIO* bio) { return *static_cast<OpenSslStream*>(BIO_get_data(bio)); }
  [[nodiscard]] SSL_SESSION* session() const;
  [[nodiscard]] ssize_t take(std::span<std::byte> to) noexcept;
  [[nodiscard]] bool encrypt(const void* data, std::size_t size);
  /// An errno: why a call of OpenSSL's that receives has failed.
  [[nodiscard]] int cause_of_failure() const noexcept;
  [[nodiscard]] bool use_certificates() noexcept;
  [[nodiscard]] bool holds_what_was_told() const noexcept;
  void forget_key() noexcept {
    key_.forget_secret();
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
  std::uint64_t records_ = 0;           ///< With the key of now.
  std::uint64_t received_records_ = 0;  ///< With the peer's key of now.
  std::uint64_t records_in_ = 0;        ///< All that have been received.
  bool shaken_ = false;
  bool accepts_certificate_ = false;
  bool refuses_certificate_ = false;
  int alert_ = -1;        ///< What the peer has said last of what it doesn't like.
  std::string wrong_;     ///< What is, with the peer's certificate.
  bool drained_ = false;  ///< Nothing of a record is inside OpenSSL.
  bool ended_ = false;    ///< The socket's bytes have.
  bool more_ = false;
  int socket_error_ = 0;  ///< An errno.
  int failure_ = 0;       ///< The same, of all later calls.
};

}  // namespace internal

}  // namespace kvferry::tcp

#endif
