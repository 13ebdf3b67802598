// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include <kvferry/rdma_transfer_channel.hpp>

#include "model_target.hpp"

namespace kvferry::inline KVFERRY_ABI::model {
namespace {

RdmaOptions rdma_options(const TargetShape& shape, ChannelOptions options) {
  RdmaOptions rdma;
  static_cast<ChannelOptions&>(rdma) = std::move(options);
  rdma.rails = RdmaTransferChannel::active_rails();
  rdma.rails.resize(std::min(shape.lanes, rdma.rails.size()));
  return rdma;
}

}  // namespace

std::size_t most_lanes() { return std::clamp<std::size_t>(RdmaTransferChannel::active_rails().size(), 1, 4); }

/// The devices may be emulated ones, in a machine that is emulated, too.
std::chrono::seconds patience() { return std::chrono::seconds(100); }

std::unique_ptr<BaseTransferChannel> make_target_channel(const TargetShape& shape, ChannelOptions options) {
  return std::make_unique<RdmaTransferChannel>(rdma_options(shape, std::move(options)));
}

std::unique_ptr<BaseTransferChannel> make_source_channel(const TargetShape& shape, ChannelOptions options) {
  RdmaOptions rdma = rdma_options(shape, std::move(options));
  rdma.stripe_threshold = std::size_t{128} << 10;
  rdma.drain_timeout = std::chrono::milliseconds(20);
  return std::make_unique<RdmaTransferChannel>(std::move(rdma));
}

}  // namespace kvferry::model
