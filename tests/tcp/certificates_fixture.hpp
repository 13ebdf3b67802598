// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp/certificates.hpp>

#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {

using kvferry::testing::authority;
using kvferry::testing::CertificateDirectory;
using kvferry::testing::has;
using kvferry::testing::Identity;
using kvferry::testing::issue;

class CertificatesTest : public ::testing::Test {
 protected:
  /// Why they aren't taken.
  std::error_code refused(std::string& why) {
    try {
      (void)tls_->read_certificates(directory_.files());
      why.clear();
      return {};
    } catch (const TransferError& error) {
      why = error.what();
      return error.code();
    }
  }
  void expect_refused(std::error_code code, const std::vector<std::string>& parts) {
    std::string why;
    EXPECT_EQ(refused(why), code) << why;
    for (const std::string& part : parts) {
      EXPECT_TRUE(has(why, part)) << part << " isn't in: " << why;
    }
    directory_.set(own_, ca_);
    EXPECT_FALSE(refused(why)) << "the next try is to begin with sound ones: " << why;
  }

  std::shared_ptr<Certificates> in_force() {
    auto logger = std::make_shared<kit::Logger>(
        [this](const LogRecord& record) {
          log_.emplace_back(std::string(record.event) + ": " + std::string(record.text));
        },
        LogLevel::debug);
    return std::make_shared<Certificates>(tls_, directory_.files(), logger);
  }

  const Identity ca_ = authority("ca");
  const Identity own_ = issue({.name = "own", .by = &ca_});
  const Identity next_ = issue({.name = "nxt", .by = &ca_});
  CertificateDirectory directory_{own_, ca_};
  const CertificateFiles files_ = directory_.files();
  const std::shared_ptr<TlsContext> tls_ = TlsContext::create();
  std::vector<std::string> log_;
};

}  // namespace kvferry::tcp
