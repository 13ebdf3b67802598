// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <memory>
#include <utility>

#include <kvferry/tcp_transfer_channel.hpp>

#include "model_target.hpp"

namespace kvferry::inline KVFERRY_ABI::model {

std::size_t most_lanes() { return 8; }

std::chrono::seconds patience() { return std::chrono::seconds(20); }

std::unique_ptr<BaseTransferChannel> make_target_channel(const TargetShape& shape, ChannelOptions options) {
  TcpOptions tcp;
  static_cast<ChannelOptions&>(tcp) = std::move(options);
  tcp.lanes_per_peer = shape.lanes;
  tcp.receive_buffer = std::size_t{64} << 10;  // so that much of what is given up waits in the kernel
  return std::make_unique<TcpTransferChannel>(std::move(tcp));
}

std::unique_ptr<BaseTransferChannel> make_source_channel(const TargetShape& shape, ChannelOptions options) {
  TcpOptions tcp;
  static_cast<ChannelOptions&>(tcp) = std::move(options);
  tcp.lanes_per_peer = shape.lanes;
  tcp.stripe_threshold = std::size_t{128} << 10;
  tcp.drain_timeout = std::chrono::milliseconds(20);
  return std::make_unique<TcpTransferChannel>(std::move(tcp));
}

}  // namespace kvferry::model
