// SPDX-License-Identifier: Apache-2.0
#include "channel_settings.hpp"

#ifdef KVFERRY_BENCH_WITH_RDMA
#include <kvferry/rdma_transfer_channel.hpp>
#endif
#include <kvferry/keyring.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/url.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <utility>

namespace bench {
namespace {

void apply(const ChannelSettings& settings, const kvferry::MemoryRegion& region, const std::string& init_host,
           kvferry::ChannelOptions& options) {
  if (region.size != 0) {
    options.regions = {region};
  }
  if (!init_host.empty()) {
    options.peer_init_url = kvferry::HostPort{init_host, 0}.to_url();
  }
  options.checksums = settings.checksums;
  if (!settings.key.empty()) {
    kvferry::KeyPair pair = kvferry::key_pair_of(kvferry::SecretKey(settings.key));
    std::vector<kvferry::PeerKey> peers{{std::string(kvferry::PeerKey::any_id), pair.public_key}};
    options.keyring = std::make_shared<kvferry::Keyring>(std::move(pair), std::move(peers));
  }
  if (settings.io_threads != 0) {
    options.io_threads = settings.io_threads;
  }
  if (settings.poll == "never") {
    options.poll.spin = {};
  } else if (settings.poll == "adaptive") {
    options.poll.spin = std::chrono::microseconds(settings.spin_us == 0 ? 50 : settings.spin_us);
  } else if (settings.poll == "always") {
    options.poll.spin = std::chrono::hours(1);
  }
}

}  // namespace

std::unique_ptr<kvferry::BaseTransferChannel> make_channel(const ChannelSettings& settings,
                                                           const kvferry::MemoryRegion& region,
                                                           const std::string& init_host) {
#ifdef KVFERRY_BENCH_WITH_RDMA
  if (settings.transport == "rdma") {
    kvferry::RdmaOptions options;
    apply(settings, region, init_host, options);
    // As many rails as a connection is to have lanes.
    options.rails = kvferry::RdmaTransferChannel::active_rails();
    options.rails.resize(std::min(settings.lanes, options.rails.size()));
    if (settings.queue_pairs != 0) {
      options.queue_pairs_per_rail = settings.queue_pairs;
    }
    return std::make_unique<kvferry::RdmaTransferChannel>(std::move(options));
  }
#endif
  if (settings.transport == "shm") {
    kvferry::ShmOptions options;
    apply(settings, region, init_host, options);
    return std::make_unique<kvferry::ShmTransferChannel>(std::move(options));
  }
  kvferry::TcpOptions options;
  apply(settings, region, init_host, options);
  if (settings.lanes != 0) {
    options.lanes_per_peer = settings.lanes;
  }
  if (settings.send_buffer != 0) {
    options.send_buffer = settings.send_buffer;
  }
  if (settings.receive_buffer != 0) {
    options.receive_buffer = settings.receive_buffer;
  }
  options.congestion_control = settings.congestion;
  return std::make_unique<kvferry::TcpTransferChannel>(std::move(options));
}

std::optional<Window> window_of([[maybe_unused]] const kvferry::BaseTransferChannel& channel) {
#ifdef KVFERRY_BENCH_WITH_RDMA
  if (const auto* const rdma = dynamic_cast<const kvferry::RdmaTransferChannel*>(&channel)) {
    Window sum;
    for (const auto& rail : rdma->rails()) {
      sum.lists += rail.window.lists;
      sum.drained += rail.window.drained;
      sum.left += rail.window.left * static_cast<double>(rail.window.lists);
    }
    sum.left /= static_cast<double>(std::max<std::uint64_t>(sum.lists, 1));
    return sum;
  }
#endif
  return std::nullopt;
}

std::vector<std::string> transports() {
#ifdef KVFERRY_BENCH_WITH_RDMA
  return {"tcp", "shm", "rdma"};
#else
  return {"tcp", "shm"};
#endif
}

}  // namespace bench
