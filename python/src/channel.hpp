// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>

#include "memory.hpp"

namespace kvferry::python {

/// Answers side messages by a Python function, on the channel's thread.
/// `function(type, encoded)` returns the answer's bytes, or (code, sentence) for an error.
class SideMessageHandler {
 public:
  explicit SideMessageHandler(nb::object function) : function_(std::move(function)) {}
  SideMessageHandler(const SideMessageHandler&) = delete;
  SideMessageHandler& operator=(const SideMessageHandler&) = delete;
  /// With the GIL.
  ~SideMessageHandler() = default;

  /// Without the GIL, which it takes.
  [[nodiscard]] SideMessage answer(const SideMessage& message) const;

 private:
  nb::object function_;
};

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

void bind_channel(nb::module_& module);

}  // namespace kvferry::python
