// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/openssl_stream.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/ssl.h>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <mutex>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/tcp/openssl_certificates-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

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

/// One in the process, which is never freed: there are not 128 types of them, and none comes back.
KVFERRY_INLINE const BIO_METHOD* socket_method() {
  static const BIO_METHOD* const method = [] {
    const int type = BIO_get_new_index();
    BIO_METHOD* const made =
        type < 0 || type >= BIO_TYPE_DESCRIPTOR ? nullptr : BIO_meth_new(type | BIO_TYPE_SOURCE_SINK, "kvferry");
    if (made == nullptr) {
      throw TransferError(errc::resource_limit,
                          "TcpOptions::encryption: OpenSSL has no type of BIO left, or memory is used up");
    }
    BIO_meth_set_write(made, &OpenSslStream::write_bio);
    BIO_meth_set_read(made, &OpenSslStream::read_bio);
    BIO_meth_set_ctrl(made, &OpenSslStream::control_bio);
    return made;
  }();
  return method;
}

KVFERRY_INLINE OpenSslContext::OpenSslContext(std::uint64_t records_per_key) : records_per_key_(records_per_key) {
  // Its threads may still be at work when the process exits.
  OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, nullptr);
  const OpenSslErrors errors;
  context_.reset(SSL_CTX_new(TLS_method()));
  // One hash for all of them, as a key goes with one.
  const char* const suites = cpu_has_aes() ? "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
                                           : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256";
  SSL_CTX* const context = context_.get();
  if (context == nullptr || SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) != 1 ||
      SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION) != 1 || SSL_CTX_set_ciphersuites(context, suites) != 1 ||
      SSL_CTX_set1_groups_list(context, "X25519") != 1) {
    throw TransferError(errc::not_supported,
                        "TcpOptions::encryption: OpenSSL can't do TLS 1.3: " + OpenSslErrors::reason());
  }
  socket_ = socket_method();
  // The system's configuration (openssl.cnf) of these is for other programs. It may allow keys that a stolen secret opens,
  // take a cut for an end, or pad records beyond the room that `send` sets aside.
  SSL_CTX_clear_options(context, SSL_CTX_get_options(context));
  SSL_CTX_set_block_padding(context, 0);
  // Whichever side has no instructions for AES gets ChaCha20. Nothing is resumed: a new connection has a new key.
  SSL_CTX_set_options(context, SSL_OP_NO_COMPRESSION | SSL_OP_ENABLE_MIDDLEBOX_COMPAT |
                                   SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_PRIORITIZE_CHACHA | SSL_OP_NO_TICKET);
  SSL_CTX_set_num_tickets(context, 0);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  // An idle connection keeps no buffers.
  SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_read_ahead(context, 1);
  SSL_CTX_set_default_read_buffer_len(context, tls_read_bytes);
  SSL_CTX_set_msg_callback(context, &OpenSslStream::see_message);
  SSL_CTX_set_psk_use_session_callback(context, &OpenSslStream::use_key);
  SSL_CTX_set_psk_find_session_callback(context, &OpenSslStream::find_key);
}

KVFERRY_INLINE void OpenSslContext::set_up_certificates() {
  SSL_CTX* const context = context_.get();
  // As strong as the keys that are agreed: RSA from 2,048 bits on, and no SHA-1. The system's policy may ask for more.
  SSL_CTX_set_security_level(context, std::max(SSL_CTX_get_security_level(context), 2));
  // The signatures of PKCS #1 are allowed for certificates that a CA has signed.
  constexpr const char* signatures =
      "ed25519:ed448:ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:rsa_pss_rsae_"
      "sha512:"
      "rsa_pss_pss_sha256:rsa_pss_pss_sha384:rsa_pss_pss_sha512:RSA+SHA256:RSA+SHA384:RSA+SHA512";
  if (SSL_CTX_set1_sigalgs_list(context, signatures) != 1 ||
      SSL_CTX_set1_client_sigalgs_list(context, signatures) != 1 ||
      SSL_CTX_add_custom_ext(context, identity_extension, SSL_EXT_CLIENT_HELLO, &OpenSslStream::add_identity, nullptr,
                             nullptr, nullptr, nullptr) != 1) {
    throw TransferError(errc::not_supported,
                        "TcpOptions::certificates: OpenSSL can't do what they take: " + OpenSslErrors::reason());
  }
  // Nothing is shown but what stands in the file.
  SSL_CTX_set_mode(context, SSL_MODE_NO_AUTO_CHAIN);
  SSL_CTX_set_max_cert_list(context, max_certificate_chain + (max_certificate_chain >> 2));
  SSL_CTX_set_client_hello_cb(context, &OpenSslStream::see_opening, nullptr);
  SSL_CTX_set_cert_verify_callback(context, &OpenSslStream::judge_certificate, nullptr);
}

KVFERRY_INLINE std::shared_ptr<const TlsCertificates> OpenSslContext::read_certificates(const CertificateFiles& files) {
  // Not for channels without certificates: those get on with an OpenSSL that can't do all of this.
  std::call_once(certificates_set_up_, [this] {
    const OpenSslErrors errors;
    set_up_certificates();
  });
  return std::make_shared<const OpenSslCertificates>(context_.get(), files);
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

}  // namespace internal
}  // namespace kvferry::tcp

#endif
