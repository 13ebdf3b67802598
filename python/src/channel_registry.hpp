// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include <kvferry/base_transfer_channel.hpp>

#include "side_message_handler.hpp"

namespace kvferry::python {

/// The channels that there are, which the interpreter's exit closes, and those that are left to be destroyed. All with the GIL.
class ChannelRegistry {
 public:
  static void add(const std::shared_ptr<BaseTransferChannel>& channel);
  static void remove(const std::shared_ptr<BaseTransferChannel>& channel);

  /// Takes a channel whose last reference a handler let go on a thread of the channel's own, which can't destroy it, and may
  /// call the handler again for messages that it holds.
  static void leave(std::unique_ptr<SideMessageHandler> handler, std::shared_ptr<BaseTransferChannel> channel);
  /// Destroys those that were left, unless the calling thread may be of one of them. Releases the GIL meanwhile.
  static void destroy_leftovers();

  /// Begins the interpreter's exit, and closes all channels. Releases the GIL meanwhile.
  static void close_all();
};

}  // namespace kvferry::python
