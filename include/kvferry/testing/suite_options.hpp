// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

#include <kvferry/channel_options.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The options of the suite's channels: deadlines shorter than the suite's patience, and regions of any pages, because
/// the local regions' numbers differ.
[[nodiscard]] inline ChannelOptions suite_options() {
  ChannelOptions options;
  options.require_equal_page_sizes = false;
  options.default_timeout = std::chrono::milliseconds(20'000);
  options.handshake_timeout = std::chrono::milliseconds(20'000);
  return options;
}

}  // namespace kvferry::testing
