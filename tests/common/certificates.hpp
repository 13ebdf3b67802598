// SPDX-License-Identifier: Apache-2.0
// Certificate authorities and certificates that a test makes for itself.
#pragma once

#include <gtest/gtest.h>

#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/tcp_certificates.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

inline bool has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

using PrivateKey = std::shared_ptr<EVP_PKEY>;

inline PrivateKey of_openssl(EVP_PKEY* key) { return {key, &EVP_PKEY_free}; }
inline PrivateKey ec_key(const char* curve = "P-256") { return of_openssl(EVP_EC_gen(curve)); }
inline PrivateKey rsa_key(std::size_t bits = 2048) {
  return of_openssl(EVP_PKEY_Q_keygen(nullptr, nullptr, "RSA", bits));
}
inline PrivateKey ed25519_key() { return of_openssl(EVP_PKEY_Q_keygen(nullptr, nullptr, "ED25519")); }
inline PrivateKey ed448_key() { return of_openssl(EVP_PKEY_Q_keygen(nullptr, nullptr, "ED448")); }
inline PrivateKey rsa_pss_key() {
  const std::unique_ptr<EVP_PKEY_CTX, decltype(&EVP_PKEY_CTX_free)> made(
      EVP_PKEY_CTX_new_from_name(nullptr, "RSA-PSS", nullptr), &EVP_PKEY_CTX_free);
  EVP_PKEY* key = nullptr;
  EXPECT_EQ(EVP_PKEY_keygen_init(made.get()), 1);
  EXPECT_EQ(EVP_PKEY_CTX_set_rsa_keygen_bits(made.get(), 2048), 1);
  EXPECT_EQ(EVP_PKEY_generate(made.get(), &key), 1);
  return of_openssl(key);
}
/// One of each kind that is taken.
inline std::vector<PrivateKey> keys_of_all_kinds() {
  return {ec_key(), ec_key("P-384"), ec_key("P-521"), rsa_key(), rsa_pss_key(), ed25519_key(), ed448_key()};
}
/// The same one each time, in each process.
inline PrivateKey lasting_key(unsigned char number) {
  std::array<unsigned char, 32> seed{};
  seed.fill(number);
  return of_openssl(EVP_PKEY_new_raw_private_key(EVP_PKEY_ED25519, nullptr, seed.data(), seed.size()));
}

/// A certificate with its private key.
struct Identity {
  std::shared_ptr<X509> certificate;
  PrivateKey key;

  [[nodiscard]] std::string pem() const {
    return written([this](BIO* bio) { return PEM_write_bio_X509(bio, certificate.get()); });
  }
  [[nodiscard]] std::string key_pem(const char* passphrase = nullptr) const {
    return written([&](BIO* bio) {
      return PEM_write_bio_PrivateKey(bio, key.get(), passphrase == nullptr ? nullptr : EVP_aes_128_cbc(), nullptr, 0,
                                      nullptr, const_cast<char*>(passphrase));
    });
  }
  [[nodiscard]] std::array<std::byte, 32> hash() const {
    std::array<std::byte, 32> made{};
    X509_digest(certificate.get(), EVP_sha256(), reinterpret_cast<unsigned char*>(made.data()), nullptr);
    return made;
  }
  /// The same in hexadecimal digits.
  [[nodiscard]] std::string sha256() const {
    std::string digits;
    for (const std::byte byte : hash()) {
      std::array<char, 3> two{};
      (void)std::snprintf(two.data(), two.size(), "%02x", std::to_integer<unsigned>(byte));
      digits += two.data();
    }
    return digits;
  }

 private:
  template <class Write>
  static std::string written(Write write) {
    const std::unique_ptr<BIO, decltype(&BIO_free)> bio(BIO_new(BIO_s_mem()), &BIO_free);
    EXPECT_EQ(write(bio.get()), 1);
    char* data = nullptr;
    const long size = BIO_get_mem_data(bio.get(), &data);
    return {data, static_cast<std::size_t>(size)};
  }
};

/// The contents of a certificate.
struct Wanted {
  std::string name;
  const Identity* by = nullptr;  ///< Null: signed by itself.
  PrivateKey key = nullptr;      ///< Null: a new one.
  bool ca = false;
  long from = -3600;  ///< Seconds from now.
  long to = 3600;
  const char* uses = "clientAuth,serverAuth";  ///< Null: whatever.
  std::size_t padding = 0;                     ///< Bytes of a comment.
  const EVP_MD* digest = EVP_sha256();         ///< Of the signature, if its key takes one.
  bool lasting = false;  ///< The same bytes each time: of a time long ago, for ever. For keys that sign so.
};

inline Identity issue(const Wanted& wanted) {
  static std::atomic<long> number{1};
  Identity made{{X509_new(), &X509_free}, wanted.key ? wanted.key : ec_key()};
  X509* const certificate = made.certificate.get();
  X509_set_version(certificate, X509_VERSION_3);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate), wanted.lasting ? 1 : ++number);
  if (wanted.lasting) {
    ASN1_TIME_set_string_X509(X509_getm_notBefore(certificate), "20200101000000Z");
    ASN1_TIME_set_string_X509(X509_getm_notAfter(certificate), "99991231235959Z");
  } else {
    X509_gmtime_adj(X509_getm_notBefore(certificate), wanted.from);
    X509_gmtime_adj(X509_getm_notAfter(certificate), wanted.to);
  }
  X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_UTF8,
                             reinterpret_cast<const unsigned char*>(wanted.name.data()),
                             static_cast<int>(wanted.name.size()), -1, 0);
  const Identity& issuer = wanted.by == nullptr ? made : *wanted.by;
  X509_set_issuer_name(certificate, X509_get_subject_name(issuer.certificate.get()));
  X509_set_pubkey(certificate, made.key.get());
  const auto extend = [&](int kind, const std::string& value) {
    X509V3_CTX context;
    X509V3_set_ctx(&context, issuer.certificate.get(), certificate, nullptr, nullptr, 0);
    X509_EXTENSION* const extension = X509V3_EXT_conf_nid(nullptr, &context, kind, value.c_str());
    ASSERT_NE(extension, nullptr) << value;
    X509_add_ext(certificate, extension, -1);
    X509_EXTENSION_free(extension);
  };
  extend(NID_basic_constraints, wanted.ca ? "critical,CA:TRUE" : "critical,CA:FALSE");
  extend(NID_key_usage, wanted.ca ? "critical,keyCertSign,cRLSign" : "critical,digitalSignature");
  if (wanted.uses != nullptr && !wanted.ca) {
    extend(NID_ext_key_usage, wanted.uses);
  }
  if (wanted.padding != 0) {
    extend(NID_netscape_comment, std::string(wanted.padding, 'x'));
  }
  const bool by_edwards =
      EVP_PKEY_is_a(issuer.key.get(), "ED25519") == 1 || EVP_PKEY_is_a(issuer.key.get(), "ED448") == 1;
  EXPECT_GT(X509_sign(certificate, issuer.key.get(), by_edwards ? nullptr : wanted.digest), 0);
  return made;
}

inline Identity authority(const std::string& name, const Identity* by = nullptr) {
  return issue({.name = name, .by = by, .ca = true});
}

/// Has a dialing side say which handshake it is of, as docs/wire_protocol.md has it. @param identity outlives the context.
inline void name_handshake(SSL_CTX* context, std::array<std::byte, 16>& identity) {
  EXPECT_EQ(SSL_CTX_add_custom_ext(
                context, 0xff4b, SSL_EXT_CLIENT_HELLO,
                [](SSL*, unsigned, unsigned, const unsigned char** out, std::size_t* size, X509*, std::size_t, int*,
                   void* of) {
                  const auto& named = *static_cast<std::array<std::byte, 16>*>(of);
                  *out = reinterpret_cast<const unsigned char*>(named.data());
                  *size = named.size();
                  return 1;
                },
                nullptr, &identity, nullptr, nullptr),
            1);
}

/// Files of a certificate that each process makes alike, for as long as it runs. They have no names that could be left behind.
inline CertificateFiles lasting_certificates() {
  static const CertificateFiles files = [] {
    const Identity ca = issue({.name = "lasting ca", .key = lasting_key(1), .ca = true, .lasting = true});
    const Identity own = issue({.name = "lasting", .by = &ca, .key = lasting_key(2), .lasting = true});
    const auto kept = [](const std::string& text) {
      const int descriptor = ::memfd_create("certificate", MFD_CLOEXEC);
      EXPECT_EQ(::fchmod(descriptor, 0600), 0);
      EXPECT_EQ(::write(descriptor, text.data(), text.size()), static_cast<ssize_t>(text.size()));
      return "/proc/self/fd/" + std::to_string(descriptor);
    };
    return CertificateFiles{kept(own.pem()), kept(own.key_pem()), kept(ca.pem())};
  }();
  return files;
}

/// A side's three files, in a directory of their own.
class CertificateDirectory {
 public:
  CertificateDirectory() {
    std::string pattern = ::testing::TempDir() + "kvferry-certificates-XXXXXX";
    EXPECT_NE(::mkdtemp(pattern.data()), nullptr);
    path_ = pattern;
  }
  CertificateDirectory(const Identity& own, const Identity& trusted) : CertificateDirectory() { set(own, trusted); }
  ~CertificateDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  CertificateDirectory(const CertificateDirectory&) = delete;
  CertificateDirectory& operator=(const CertificateDirectory&) = delete;

  void set(const Identity& own, const Identity& trusted) const {
    // One at a time: until all are there, they don't belong together.
    put(files().chain, own.pem());
    put(files().key, own.key_pem());
    put(files().trusted, trusted.pem());
  }
  /// Takes the place of what was there at once.
  static void put(const std::string& path, const std::string& text, mode_t mode = 0600) {
    const std::string fresh = path + ".new";
    std::ofstream(fresh, std::ios::binary) << text;
    EXPECT_EQ(::chmod(fresh.c_str(), mode), 0);
    EXPECT_EQ(::rename(fresh.c_str(), path.c_str()), 0);
  }
  /// Writes over what was there.
  static void overwrite(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }

  [[nodiscard]] CertificateFiles files() const { return {path_ + "/chain.pem", path_ + "/key.pem", path_ + "/ca.pem"}; }

 private:
  std::string path_;
};

}  // namespace kvferry::testing
