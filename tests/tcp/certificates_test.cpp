// SPDX-License-Identifier: Apache-2.0
// Files of certificates: which are taken, and what is said of the others.
#include <kvferry/tcp/certificates.hpp>

#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include "certificates_fixture.hpp"
#include "common/certificates.hpp"
#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using kvferry::testing::ec_key;
using kvferry::testing::rsa_key;

const std::error_code invalid = std::make_error_code(std::errc::invalid_argument);

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
  /// Looks at them until they are that old.
  static void grow_old(Certificates& certificates) {
    const auto old = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
    while (std::chrono::steady_clock::now() < old) {
      (void)certificates.current();
      std::this_thread::yield();
    }
  }
  static void expect_taken_up(Certificates& certificates, const Identity& fresh) {
    const auto deadline = std::chrono::steady_clock::now() + kvferry_test::long_enough;
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

}  // namespace
}  // namespace kvferry::tcp
