// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include <kvferry/base_transfer_channel.hpp>

#include "memory.hpp"
#include "side_message_handler.hpp"

namespace kvferry::python {

/// A channel of any transport, as Python gets it.
struct MadeChannel {
  std::shared_ptr<BaseTransferChannel> channel;
  /// Lets side messages through to the handler.
  std::function<void()> answer_side_messages;
  /// Whether this thread is the handler's, which alone could answer a message to that url. Null: there is no handler.
  std::function<bool(std::string_view)> would_wait_for_itself;
  /// What the transport answers to a message by itself.
  std::function<SideMessage(const SideMessage&)> own_answer;
};

/// Makes a channel whose side messages go to `handler`; without one, the transport answers those that it knows.
/// @param transport "tcp", "shm", "auto", "rdma".
/// @param options by the names of the transport's options; times in seconds.
[[nodiscard]] MadeChannel make_channel(const std::string& transport, const nb::dict& options, const Regions& regions,
                                       const SideMessageHandler* handler);

}  // namespace kvferry::python
