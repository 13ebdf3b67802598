// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/certificates.hpp>

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE Certificates::Certificates(std::shared_ptr<TlsContext> tls, CertificateFiles files,
                                          std::shared_ptr<kit::Logger> logger)
    : tls_(std::move(tls)), files_(std::move(files)), logger_(std::move(logger)), seen_(states()) {
  current_ = tls_->read_certificates(files_);
}

KVFERRY_INLINE Certificates::State Certificates::state_of(const std::string& path) noexcept {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    return {.error = errno};
  }
  const auto nanoseconds = [](const timespec& time) {
    return std::int64_t{time.tv_sec} * 1'000'000'000 + std::int64_t{time.tv_nsec};
  };
  return {0, status.st_dev, status.st_ino, status.st_size, nanoseconds(status.st_mtim), nanoseconds(status.st_ctim)};
}

KVFERRY_INLINE Certificates::States Certificates::states() const noexcept {
  return {state_of(files_.chain), state_of(files_.key), state_of(files_.trusted)};
}

KVFERRY_INLINE std::shared_ptr<const TlsCertificates> Certificates::current() {
  const std::lock_guard lock(mutex_);
  // Before they are read: what changes meanwhile is seen the next time.
  const States now = states();
  if (now != seen_ || (!settled_ && std::chrono::steady_clock::now() >= again_)) {
    look_again(now);
  }
  return current_;
}

KVFERRY_INLINE void Certificates::look_again(const States& now) {
  constexpr std::chrono::seconds read_again_after(1);
  // A file that is written twice within a tick of the file system's clock may look the same as before.
  constexpr std::int64_t tick = 2'000'000'000;
  const std::int64_t today =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  settled_ = std::ranges::all_of(
      now, [today](const State& file) { return std::max(file.modified, file.changed) < today - tick; });
  if (now != seen_) {
    complaint_.clear();
  }
  seen_ = now;
  again_ = {};
  std::error_code cause;
  std::string why;
  try {
    auto fresh = tls_->read_certificates(files_);
    complaint_.clear();
    if (fresh->content() != current_->content()) {
      logger_->log(LogLevel::info, "certificates_replaced", {}, {}, [&] {
        return fresh->hash() == current_->hash()
                   ? "this side goes on showing " + current_->description() +
                         "; changed are the certificates behind it, or those that this side trusts"
                   : "from now on this side shows " + fresh->description() + "; before " + current_->description();
      });
      current_ = std::move(fresh);
    }
    return;
  } catch (const TransferError& error) {
    cause = error.code();
    why = error.what();
  } catch (const std::exception& error) {
    cause = errc::resource_limit;
    why = error.what();
  }
  // The same files may be sound later: when a certificate's time has come, or a descriptor is free to read them by.
  settled_ = false;
  again_ = std::chrono::steady_clock::now() + read_again_after;
  if (std::exchange(complaint_, cause) != cause) {
    logger_->log(LogLevel::warning, "certificates_not_replaced", {}, cause,
                 [&] { return why + "; this side goes on with " + current_->description(); });
  }
}

}  // namespace kvferry::tcp
