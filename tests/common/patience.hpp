// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

#include <kvferry/channel_options.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry_test {

/// What a test waits for that has to come. A busy machine may leave a process alone for seconds; under a sanitizer each step takes
/// several times as long besides.
inline constexpr std::chrono::seconds long_enough{kvferry::testing::sanitized ? 90 : 30};

/// With as much time for calls that have to succeed, where a test gives them none of its own.
template <class Options>
[[nodiscard]] Options patient(Options options) {
  const kvferry::ChannelOptions usual;
  if (options.handshake_timeout == usual.handshake_timeout) {
    options.handshake_timeout = long_enough;
  }
  if (options.default_timeout == usual.default_timeout) {
    options.default_timeout = long_enough;
  }
  return options;
}

}  // namespace kvferry_test
