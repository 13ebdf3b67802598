// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

#include <kvferry/channel_options.hpp>
#include <kvferry/testing/test_watchdog.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The options of the suite's channels: deadlines shorter than the suite's patience, and regions of any pages, because
/// the local regions' numbers differ. A busy machine may leave a process alone for seconds, so what has to succeed has the
/// more time the slower the program is.
[[nodiscard]] inline ChannelOptions suite_options() {
  ChannelOptions options;
  options.require_equal_page_sizes = false;
  options.default_timeout = scaled(std::chrono::milliseconds(sanitized ? 60'000 : 20'000));
  options.handshake_timeout = options.default_timeout;
  return options;
}

}  // namespace kvferry::testing
