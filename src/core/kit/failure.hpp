// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <system_error>

namespace kvferry::kit {

/// An error code and the sentence that goes with it; no error by default.
struct Failure {
  std::error_code code;
  std::string sentence;

  explicit operator bool() const noexcept { return static_cast<bool>(code); }
};

}  // namespace kvferry::kit
