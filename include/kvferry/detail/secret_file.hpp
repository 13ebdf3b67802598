// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <string>
#include <system_error>

#include <kvferry/config.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A secret that others can read or write is none.
/// @param what the file, for the error. @throws TransferError EACCES, naming the file's mode or user and those it should have.
inline void require_owner_only(const struct stat& status, const std::string& what) {
  if (status.st_uid != ::geteuid() && status.st_uid != 0) {
    throw TransferError(std::make_error_code(std::errc::permission_denied),
                        what + " belongs to user " + std::to_string(status.st_uid) +
                            ", who has the key then; it must belong to user " + std::to_string(::geteuid()) +
                            " of this process, or to root");
  }
  if ((status.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    std::array<char, 8> mode{};
    (void)std::snprintf(mode.data(), mode.size(), "%04o", static_cast<unsigned>(status.st_mode & 07777U));
    throw TransferError(std::make_error_code(std::errc::permission_denied),
                        what + " has mode " + mode.data() +
                            ", so that others than its owner have the key; it must have mode 0600 or 0400");
  }
}

}  // namespace kvferry
