// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/tls_stream.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/bio.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <memory>
#include <string>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

class CertificateFile;

struct FreeOfOpenSsl {
  void operator()(BIO* bio) const noexcept { BIO_free(bio); }
  void operator()(X509* certificate) const noexcept { X509_free(certificate); }
  void operator()(EVP_PKEY* key) const noexcept { EVP_PKEY_free(key); }
  void operator()(X509_STORE* store) const noexcept { X509_STORE_free(store); }
  void operator()(STACK_OF(X509) * chain) const noexcept { sk_X509_pop_free(chain, &X509_free); }
};
template <class Object>
using OfOpenSsl = std::unique_ptr<Object, FreeOfOpenSsl>;

class OpenSslCertificates final : public TlsCertificates {
 public:
  /// @param context says how strong they have to be. @throws TransferError naming the file and what is wrong with it;
  /// std::bad_alloc
  OpenSslCertificates(SSL_CTX* context, const CertificateFiles& files);

  [[nodiscard]] const CertificateHash& hash() const noexcept override { return hash_; }
  [[nodiscard]] const CertificateHash& content() const noexcept override { return content_; }
  [[nodiscard]] const std::string& description() const noexcept override { return description_; }

  /// Has a connection show them, and trust whom they trust. @return whether it does; OpenSSL's list says why not.
  [[nodiscard]] bool use(SSL* ssl) const noexcept;

 private:
  void take_chain(const CertificateFile& file);
  void take_key(const CertificateFile& file, const CertificateFile& chain);
  void take_trusted(const CertificateFile& file);

  OfOpenSsl<X509> own_;
  OfOpenSsl<STACK_OF(X509)> chain_;  ///< What stands behind it.
  OfOpenSsl<EVP_PKEY> key_;
  OfOpenSsl<X509_STORE> trusted_;
  CertificateHash hash_{};
  CertificateHash content_{};
  std::string description_;
};

/// @name Of a certificate, for a sentence: a stranger may have made it
/// @{
[[nodiscard]] CertificateHash hash_of(const X509* certificate);
[[nodiscard]] std::string in_digits(const CertificateHash& hash);
/// "'CN=b', SHA-256 ..., valid from ... to ...".
[[nodiscard]] std::string description_of(const X509* certificate);
/// @}

}  // namespace internal
}  // namespace kvferry::tcp

#endif
