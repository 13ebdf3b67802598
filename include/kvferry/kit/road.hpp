// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ROAD_HPP
#define KVFERRY_KIT_ROAD_HPP

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/channel_stats.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/poller.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The parts that a road's channel gets from the channel to which it belongs (`ChannelOptions::road_of`). The executor
/// is among its options.
struct RoadOf {
  std::uint64_t incarnation = 0;
  std::shared_ptr<Logger> logger;
  std::shared_ptr<Refusals> refusals;
  std::shared_ptr<Poller> poller;  ///< Null with an executor of the user's.
};

/// A transport as a part of another channel: its connections, without handshakes, peers and operations of its own. The
/// functions are those that `TransferChannelKit` calls.
class Road {
 public:
  /// @param channel made with `ChannelOptions::road_of`.
  explicit Road(std::unique_ptr<TransferChannelKit> channel) : channel_(std::move(channel)) {}

  /// Whether the channel has the option that makes it a road. `AutoRoad::make` may have lost it.
  [[nodiscard]] bool is_of(const std::shared_ptr<const RoadOf>& whole) const noexcept {
    return channel_->options().road_of == whole;
  }
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept { return channel_->leaves_host_in_the_clear(); }
  [[nodiscard]] Capabilities capabilities() const noexcept { return channel_->capabilities(); }
  [[nodiscard]] std::vector<PathStats> paths() const { return channel_->stats().paths; }

  [[nodiscard]] std::unique_ptr<Dial> dial(const std::string& peer_id) { return channel_->dial(peer_id); }
  [[nodiscard]] bool run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) {
    return channel_->run_accept(source, bytes, std::move(answer));
  }
  [[nodiscard]] Bytes accept(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint, Clock::time_point deadline,
                             LinkHandler on_link) {
    return channel_->accept(std::move(host), remote_endpoint, deadline, std::move(on_link));
  }
  void register_region(const LocalRegion& region) { channel_->register_region(region); }
  [[nodiscard]] std::function<void(std::uint32_t)> region_forgetter() { return channel_->region_forgetter(); }
  /// After all links have been shut.
  void stop_listening() { channel_->close(); }

 private:
  std::unique_ptr<TransferChannelKit> channel_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_ROAD_HPP
