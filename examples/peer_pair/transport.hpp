// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#ifdef KVFERRY_EXAMPLES_WITH_RDMA
#include <kvferry/rdma_transfer_channel.hpp>
#endif

#include <memory>
#include <string_view>
#include <utility>

#include "options.hpp"

namespace example {

/// The options of one transport, from those that all channels have.
template <class Options>
[[nodiscard]] Options transport_options(kvferry::ChannelOptions common) {
  Options options;
  static_cast<kvferry::ChannelOptions&>(options) = std::move(common);
  return options;
}

/// Makes a channel of the transport that the options name: `Channel<kvferry::TcpTransferChannel>` or its counterpart,
/// from the transport's options and `arguments`.
template <template <class> class Channel, class... Arguments>
[[nodiscard]] std::unique_ptr<kvferry::BaseTransferChannel> make_channel(const CommonOptions& options,
                                                                         kvferry::ChannelOptions common,
                                                                         Arguments&&... arguments) {
#ifdef KVFERRY_EXAMPLES_WITH_RDMA
  if (options.transport == "rdma") {
    return std::make_unique<Channel<kvferry::RdmaTransferChannel>>(
        transport_options<kvferry::RdmaOptions>(std::move(common)), std::forward<Arguments>(arguments)...);
  }
#endif
  if (options.transport == "auto") {
    auto chosen = transport_options<kvferry::AutoOptions>(std::move(common));
    chosen.roads = kvferry::AutoTransferChannel::default_roads();
    kvferry::TcpOptions tcp;
    tcp.lanes_per_peer = options.lanes;
    tcp.data_port = options.data_port;
    chosen.roads.back() = kvferry::road<kvferry::TcpTransferChannel>("tcp", std::move(tcp));
#ifdef KVFERRY_EXAMPLES_WITH_RDMA
    chosen.roads.insert(chosen.roads.end() - 1,
                        kvferry::road<kvferry::RdmaTransferChannel>("rdma", kvferry::RdmaOptions()));
#endif
    return std::make_unique<Channel<kvferry::AutoTransferChannel>>(std::move(chosen),
                                                                   std::forward<Arguments>(arguments)...);
  }
  auto tcp = transport_options<kvferry::TcpOptions>(std::move(common));
  tcp.lanes_per_peer = options.lanes;
  tcp.data_port = options.data_port;
  return std::make_unique<Channel<kvferry::TcpTransferChannel>>(std::move(tcp), std::forward<Arguments>(arguments)...);
}

template <class Channel>
using Itself = Channel;

/// As above, of the transport's own class.
[[nodiscard]] inline std::unique_ptr<kvferry::BaseTransferChannel> make_channel(const CommonOptions& options,
                                                                                kvferry::ChannelOptions common) {
  return make_channel<Itself>(options, std::move(common));
}

}  // namespace example
