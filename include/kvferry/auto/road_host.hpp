// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/kit/abandonment.hpp>
#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

/// The channel, as one road of an attempt sees it: can be abandoned by itself, and says nothing of links that weren't
/// taken.
class RoadHost final : public kit::LinkHost {
 public:
  explicit RoadHost(std::shared_ptr<kit::LinkHost> host) : host_(std::move(host)) {}

  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return host_->peer(); }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override { return host_->local_regions(); }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> told_regions() const override { return host_->told_regions(); }
  [[nodiscard]] bool peer_region_added(const RemoteRegion& region) override { return host_->peer_region_added(region); }
  void peer_region_removed(std::uint32_t number) override { host_->peer_region_removed(number); }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) override {
    return host_->deliver_notification(std::move(payload), key);
  }
  [[nodiscard]] bool take_memory(std::size_t bytes) override { return host_->take_memory(bytes); }
  void give_back_memory(std::size_t bytes) noexcept override { host_->give_back_memory(bytes); }
  void checksums_differed(std::size_t objects) noexcept override { host_->checksums_differed(objects); }
  void when_writes_ended(std::function<void()> done) override { host_->when_writes_ended(std::move(done)); }

  [[nodiscard]] std::shared_ptr<void> stay() override { return host_->stay(); }
  void when_abandoned(std::function<void()> drop) override { abandonment_.when_abandoned(std::move(drop)); }
  void may_take_until(kit::Clock::time_point until) noexcept override { host_->may_take_until(until); }

  void link_failed(const kit::Link& link, std::error_code cause) override {
    {
      const std::lock_guard lock(mutex_);
      if (!taken_) {
        failure_ = cause;
        return;
      }
    }
    host_->link_failed(link, cause);
  }

  /// The link of this road is the one that is used.
  void take(const kit::Link& link) {
    std::error_code failure;
    {
      const std::lock_guard lock(mutex_);
      taken_ = true;
      failure = failure_;
    }
    abandonment_.keep();
    if (failure) {
      host_->link_failed(link, failure);
    }
  }

  /// Another road is taken, or the whole attempt isn't wanted any more.
  void abandon() { abandonment_.abandon(); }

 private:
  const std::shared_ptr<kit::LinkHost> host_;
  kit::Abandonment abandonment_;
  std::mutex mutex_;
  std::error_code failure_;  ///< Of a link that isn't taken.
  bool taken_ = false;
};

}  // namespace kvferry::roads
