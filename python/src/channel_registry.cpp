// SPDX-License-Identifier: Apache-2.0
#include "channel_registry.hpp"

#include <nanobind/nanobind.h>

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "released.hpp"

namespace kvferry::python {
namespace {

struct Leftover {
  std::unique_ptr<SideMessageHandler> handler;
  std::shared_ptr<BaseTransferChannel> channel;
};

struct Registered {
  std::set<std::weak_ptr<BaseTransferChannel>, std::owner_less<>> channels;
  std::vector<Leftover> to_be_destroyed;
};

/// Never destroyed, as the interpreter is gone before a static object is.
Registered& registered() {
  static auto* const made = new Registered;
  return *made;
}

}  // namespace

void ChannelRegistry::add(const std::shared_ptr<BaseTransferChannel>& channel) {
  registered().channels.insert(channel);
}

void ChannelRegistry::remove(const std::shared_ptr<BaseTransferChannel>& channel) {
  registered().channels.erase(channel);
}

void ChannelRegistry::leave(std::unique_ptr<SideMessageHandler> handler, std::shared_ptr<BaseTransferChannel> channel) {
  registered().to_be_destroyed.push_back({std::move(handler), std::move(channel)});
}

void ChannelRegistry::destroy_leftovers() {
  if (!InterpreterExit::is_waited_for && !registered().to_be_destroyed.empty()) {
    auto leftovers = std::exchange(registered().to_be_destroyed, {});
    {
      const Released released;
      for (Leftover& leftover : leftovers) {
        leftover.channel.reset();
      }
    }
    leftovers.clear();  // the handlers, with the GIL
  }
}

void ChannelRegistry::close_all() {
  InterpreterExit::begin();
  std::vector<std::shared_ptr<BaseTransferChannel>> channels;
  for (const auto& channel : registered().channels) {
    if (auto here = channel.lock()) {
      channels.push_back(std::move(here));
    }
  }
  const nanobind::gil_scoped_release released;
  for (const auto& channel : channels) {
    channel->close();
  }
  channels.clear();
}

}  // namespace kvferry::python
