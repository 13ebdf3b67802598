// SPDX-License-Identifier: Apache-2.0
#include "channel_settings.hpp"

#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/url.hpp>

#include <chrono>

namespace bench {
namespace {

void apply(const ChannelSettings& settings, const kvferry::MemoryRegion& region, const std::string& init_host,
           kvferry::ChannelOptions& options) {
  options.regions = {region};
  if (!init_host.empty()) {
    options.peer_init_url = kvferry::HostPort{init_host, 0}.to_url();
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
  return std::make_unique<kvferry::TcpTransferChannel>(std::move(options));
}

std::vector<std::string> transports() { return {"tcp"}; }

}  // namespace bench
