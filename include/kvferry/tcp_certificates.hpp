// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_tcp.hpp>
#ifndef KVFERRY_TCP_CERTIFICATES_HPP
#define KVFERRY_TCP_CERTIFICATES_HPP

#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// PEM files of X.509 certificates, for a site that has a certificate authority (docs/security.md). All three, or none.
struct CertificateFiles {
  /// This side's certificate, for TLS clients and servers alike, and behind it those between it and the CA's.
  std::string chain;
  /// Its private key, without a passphrase. Nobody but its owner may read or write the file (mode 0600 or 0400).
  std::string key;
  /// The CA's certificates. Each is trusted as it stands, and none of the system's is.
  std::string trusted;

  [[nodiscard]] bool operator==(const CertificateFiles&) const = default;
};

}  // namespace kvferry

#endif  // KVFERRY_TCP_CERTIFICATES_HPP
