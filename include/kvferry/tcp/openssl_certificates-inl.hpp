// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/openssl_certificates.hpp>

#if KVFERRY_WITH_TLS
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <ctime>
#include <new>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/log.hpp>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/secret_file.hpp>
#include <kvferry/tcp/openssl_errors.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Bytes of a chain that is shown.
inline constexpr std::size_t max_certificate_chain = std::size_t{64} << 10;
/// All CAs of a system are a quarter of it.
inline constexpr std::size_t max_certificate_file = std::size_t{1} << 20;

template <class Object>
[[nodiscard]] OfOpenSsl<Object> not_null(Object* object) {
  if (object == nullptr) {
    throw std::bad_alloc();
  }
  return OfOpenSsl<Object>(object);
}

[[nodiscard]] KVFERRY_INLINE CertificateHash sha256_of(std::span<const std::byte> bytes) {
  CertificateHash hash{};
  if (EVP_Digest(bytes.data(), bytes.size(), reinterpret_cast<unsigned char*>(hash.data()), nullptr, EVP_sha256(),
                 nullptr) != 1) {
    throw std::bad_alloc();
  }
  return hash;
}

KVFERRY_INLINE CertificateHash hash_of(const X509* certificate) {
  CertificateHash hash{};
  if (X509_digest(certificate, EVP_sha256(), reinterpret_cast<unsigned char*>(hash.data()), nullptr) != 1) {
    throw std::bad_alloc();
  }
  return hash;
}

KVFERRY_INLINE std::string in_digits(const CertificateHash& hash) {
  constexpr std::string_view digits = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : hash) {
    text += digits[std::to_integer<std::size_t>(byte >> 4)];
    text += digits[std::to_integer<std::size_t>(byte & std::byte{15})];
  }
  return text;
}

template <class Print>
[[nodiscard]] std::string printed_by(Print print) {
  const auto bio = not_null(BIO_new(BIO_s_mem()));
  print(bio.get());
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return printable({data, static_cast<std::size_t>(size)}, 200);
}

KVFERRY_INLINE std::string text_of_time(const ASN1_TIME* time) {
  return printed_by([time](BIO* bio) { ASN1_TIME_print(bio, time); });
}

KVFERRY_INLINE std::string text_of_now() {
  const std::unique_ptr<ASN1_TIME, decltype(&ASN1_TIME_free)> now(ASN1_TIME_set(nullptr, std::time(nullptr)),
                                                                  &ASN1_TIME_free);
  return now ? text_of_time(now.get()) : "unknown";
}

KVFERRY_INLINE std::string description_of(const X509* certificate) {
  const std::string name = printed_by(
      [certificate](BIO* bio) { X509_NAME_print_ex(bio, X509_get_subject_name(certificate), 0, XN_FLAG_RFC2253); });
  return "'" + name + "', SHA-256 " + in_digits(hash_of(certificate)) + ", valid from " +
         text_of_time(X509_get0_notBefore(certificate)) + " to " + text_of_time(X509_get0_notAfter(certificate));
}

/// Bytes that may be a key's: overwritten when they go.
class PassingBytes {
 public:
  PassingBytes() = default;
  PassingBytes(const PassingBytes&) = delete;
  PassingBytes& operator=(const PassingBytes&) = delete;
  ~PassingBytes() { ::explicit_bzero(bytes_.data(), bytes_.size()); }

  [[nodiscard]] std::vector<char>& operator*() noexcept { return bytes_; }
  [[nodiscard]] const std::vector<char>& operator*() const noexcept { return bytes_; }

 private:
  std::vector<char> bytes_;
};

/// A file as it was once.
class CertificateFile {
 public:
  /// @param field of `CertificateFiles`. @param secret nobody else may read or write it. @throws TransferError
  CertificateFile(std::string_view field, const std::string& path, bool secret);
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return std::as_bytes(std::span(*bytes_)); }
  /// Reads these bytes, for as long as this lives.
  [[nodiscard]] OfOpenSsl<BIO> open() const {
    return not_null(BIO_new_mem_buf((*bytes_).data(), static_cast<int>((*bytes_).size())));
  }
  /// All of its certificates, at least one. @throws TransferError
  [[nodiscard]] std::vector<OfOpenSsl<X509>> certificates() const;
  [[noreturn]] void refuse(const std::string& why) const {
    throw TransferError(std::make_error_code(std::errc::invalid_argument), name_ + " " + why);
  }

 private:
  const std::string name_;
  PassingBytes bytes_;  ///< Not only the destructor's to overwrite: the constructor may throw.
};

KVFERRY_INLINE CertificateFile::CertificateFile(std::string_view field, const std::string& path, bool secret)
    : name_("TcpOptions::certificates." + std::string(field) + ": " + path) {
  const auto fail = [this] { throw TransferError(std::error_code(errno, std::system_category()), name_); };
  // A pipe that nobody writes to would hold up who opens it.
  const kvferry::Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat status {};
  if (!file || ::fstat(file.get(), &status) != 0) {
    fail();
  }
  if (!S_ISREG(status.st_mode)) {
    refuse("is no regular file");
  }
  if (secret) {
    require_owner_only(status, name_);
  }
  std::vector<char>& bytes = *bytes_;
  // Not made larger later: that would leave a copy behind.
  bytes.resize(std::min<std::size_t>(static_cast<std::size_t>(status.st_size), max_certificate_file) + 1);
  std::size_t filled = 0;
  for (ssize_t part = 1; part != 0 && filled != bytes.size();) {
    part = ::read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (part < 0 && errno != EINTR) {
      fail();
    }
    filled += static_cast<std::size_t>(std::max<ssize_t>(part, 0));
  }
  if (filled == bytes.size()) {
    refuse(filled > max_certificate_file ? "has more than a mebibyte" : "grows while it is read");
  }
  bytes.resize(filled);
}

KVFERRY_INLINE std::vector<OfOpenSsl<X509>> CertificateFile::certificates() const {
  std::vector<OfOpenSsl<X509>> all;
  const auto bio = open();
  for (;;) {
    ERR_clear_error();
    OfOpenSsl<X509> one(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
    if (!one) {
      break;
    }
    all.push_back(std::move(one));
  }
  const unsigned long end = ERR_peek_last_error();
  if (ERR_GET_LIB(end) != ERR_LIB_PEM || ERR_GET_REASON(end) != PEM_R_NO_START_LINE) {
    refuse("is broken behind " + std::to_string(all.size()) + " certificates: " + OpenSslErrors::reason());
  }
  if (all.empty()) {
    refuse("has no certificate: nothing in it begins with '-----BEGIN CERTIFICATE-----'");
  }
  ERR_clear_error();
  return all;
}

KVFERRY_INLINE OpenSslCertificates::OpenSslCertificates(SSL_CTX* context, const CertificateFiles& files) {
  const OpenSslErrors errors;
  const CertificateFile chain("chain", files.chain, false);
  const CertificateFile key("key", files.key, true);
  const CertificateFile trusted("trusted", files.trusted, false);
  const std::array hashes{sha256_of(chain.bytes()), sha256_of(key.bytes()), sha256_of(trusted.bytes())};
  content_ = sha256_of(std::as_bytes(std::span(hashes)));
  take_chain(chain);
  take_key(key, chain);
  take_trusted(trusted);
  // TLS has its own mind, such as about keys that are too short.
  const std::unique_ptr<SSL, decltype(&SSL_free)> trial(SSL_new(context), &SSL_free);
  if (!trial) {
    throw std::bad_alloc();
  }
  if (!use(trial.get())) {
    chain.refuse("can't be used for TLS: " + OpenSslErrors::reason());
  }
}

KVFERRY_INLINE void OpenSslCertificates::take_chain(const CertificateFile& file) {
  auto all = file.certificates();
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const X509* const one = all[i].get();
    bytes += static_cast<std::size_t>(std::max(i2d_X509(one, nullptr), 0));
    const std::string which = i == 0 ? "is of a certificate that " : "has behind it a certificate that ";
    if (X509_cmp_current_time(X509_get0_notBefore(one)) >= 0) {
      file.refuse(which + "isn't valid yet, at " + text_of_now() + ": " + description_of(one));
    }
    if (X509_cmp_current_time(X509_get0_notAfter(one)) <= 0) {
      file.refuse(which + "has expired, by " + text_of_now() + ": " + description_of(one));
    }
  }
  if (bytes > max_certificate_chain) {
    file.refuse("has certificates of " + std::to_string(bytes) + " bytes; peers take " +
                std::to_string(max_certificate_chain));
  }
  own_ = std::move(all.front());
  // Whichever side dials.
  for (const auto& [purpose, name] : {std::pair{X509_PURPOSE_SSL_CLIENT, "clients (clientAuth)"},
                                      std::pair{X509_PURPOSE_SSL_SERVER, "servers (serverAuth)"}}) {
    if (X509_check_purpose(own_.get(), purpose, 0) != 1) {
      file.refuse(std::string("is of a certificate that isn't for TLS ") + name + ": " + description_of(own_.get()));
    }
  }
  chain_ = not_null(sk_X509_new_null());
  for (auto one = all.begin() + 1; one != all.end(); ++one) {
    if (sk_X509_push(chain_.get(), one->get()) == 0) {
      throw std::bad_alloc();
    }
    (void)one->release();
  }
  hash_ = hash_of(own_.get());
  description_ = description_of(own_.get());
}

KVFERRY_INLINE void OpenSslCertificates::take_key(const CertificateFile& file, const CertificateFile& chain) {
  ERR_clear_error();
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  const auto bio = file.open();
  key_.reset(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr));
  if (!key_) {
    const unsigned long last = ERR_peek_last_error();
    file.refuse(ERR_GET_LIB(last) == ERR_LIB_PEM && ERR_GET_REASON(last) == PEM_R_BAD_PASSWORD_READ
                    ? "is of a key with a passphrase; it has to be without one"
                    : "has no private key: " + OpenSslErrors::reason());
  }
  const EVP_PKEY* const public_key = X509_get0_pubkey(own_.get());
  const auto type = [](const EVP_PKEY* key) {
    const char* const name = key == nullptr ? nullptr : EVP_PKEY_get0_type_name(key);
    return std::string(name == nullptr ? "an unknown one" : name);
  };
  if (type(key_.get()) != type(public_key)) {
    file.refuse("is of a key of type " + type(key_.get()) + ", and that of the certificate is " + type(public_key) +
                ": " + description_);
  }
  if (X509_check_private_key(own_.get(), key_.get()) != 1) {
    file.refuse("isn't the key of the first certificate in the chain: " + description_);
  }
  const std::array usable{"RSA", "RSA-PSS", "EC", "ED25519", "ED448"};
  if (std::ranges::none_of(usable, [this](const char* name) { return EVP_PKEY_is_a(key_.get(), name) == 1; })) {
    chain.refuse("is of a certificate with a key of type " + type(key_.get()) +
                 "; TLS 1.3 takes RSA, EC, ED25519 and ED448");
  }
  if (EVP_PKEY_is_a(key_.get(), "EC") == 1) {
    std::array<char, 80> curve{};
    std::size_t size = 0;
    (void)EVP_PKEY_get_group_name(key_.get(), curve.data(), curve.size(), &size);
    const std::array curves{"prime256v1", "secp384r1", "secp521r1"};
    if (std::ranges::find(curves, std::string_view(curve.data())) == curves.end()) {
      chain.refuse("is of a certificate with a key on " + (size == 0 ? "a curve without a name" : "the curve " + printable(curve.data())) +
                   "; TLS 1.3 takes P-256 (prime256v1), P-384 (secp384r1) and P-521 (secp521r1)");
    }
  }
  ERR_clear_error();
}

KVFERRY_INLINE void OpenSslCertificates::take_trusted(const CertificateFile& file) {
  const auto all = file.certificates();
  trusted_ = not_null(X509_STORE_new());
  for (const auto& one : all) {
    if (X509_STORE_add_cert(trusted_.get(), one.get()) != 1) {
      throw std::bad_alloc();
    }
  }
  // A site's CA may be one that another one has signed.
  if (X509_STORE_set_flags(trusted_.get(), X509_V_FLAG_PARTIAL_CHAIN) != 1) {
    throw std::bad_alloc();
  }
}

KVFERRY_INLINE bool OpenSslCertificates::use(SSL* ssl) const noexcept {
  return SSL_use_cert_and_key(ssl, own_.get(), key_.get(), chain_.get(), 1) == 1 &&
         SSL_set1_verify_cert_store(ssl, trusted_.get()) == 1;
}

}  // namespace internal
}  // namespace kvferry::tcp

#endif
