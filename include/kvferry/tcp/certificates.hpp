// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>

#include <kvferry/kit/logger.hpp>
#include <kvferry/tcp_certificates.hpp>

#include <kvferry/tcp/tls_stream.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// A channel's certificates: those that its files had when they were sound the last time. Each handshake looks whether the files
/// have changed. That costs three stat(2), and needs neither a thread nor a watch, which wouldn't see through the links by
/// which Kubernetes replaces files. Thread-safe.
class Certificates {
 public:
  /// @throws TransferError naming the file and what is wrong with it.
  Certificates(std::shared_ptr<TlsContext> tls, CertificateFiles files, std::shared_ptr<kit::Logger> logger);

  /// The certificates for a new handshake. Its connections keep to them, because the peer is told of them.
  [[nodiscard]] std::shared_ptr<const TlsCertificates> current();

 private:
  /// Tells whether a file has changed.
  struct State {
    int error = 0;  ///< An errno.
    dev_t device = 0;
    ino_t number = 0;
    off_t size = 0;
    std::int64_t modified = 0;  ///< Nanoseconds.
    std::int64_t changed = 0;

    [[nodiscard]] bool operator==(const State&) const = default;
  };
  using States = std::array<State, 3>;

  [[nodiscard]] static State state_of(const std::string& path) noexcept;
  [[nodiscard]] States states() const noexcept;
  void look_again(const States& now);

  const std::shared_ptr<TlsContext> tls_;
  const CertificateFiles files_;
  const std::shared_ptr<kit::Logger> logger_;
  std::mutex mutex_;                             ///< Guards what follows.
  States seen_;                                  ///< When they were read the last time.
  bool settled_ = false;                         ///< Files that look the same are the same, and were sound.
  std::chrono::steady_clock::time_point again_;  ///< Until then, files that look the same aren't read again.
  std::shared_ptr<const TlsCertificates> current_;
  std::error_code complaint_;  ///< That has been logged of files that look as `seen_`.
};

}  // namespace kvferry::tcp
