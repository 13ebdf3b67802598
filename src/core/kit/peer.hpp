// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "peer_directory.hpp"

namespace kvferry::kit {

struct PeerDirectory::Peer {
  /// handing_over: there is a link, and operations that waited for it are going there; later ones queue up behind them,
  /// so that sends and recvs of a tag stay in order.
  enum class State { unconnected, dialing, accepting, handing_over, ready };

  std::string id;
  std::string local_id;  ///< How the peer knows this channel.
  std::string url;       ///< Where it answers handshakes, if known.
  State state = State::unconnected;
  std::vector<Waiter> waiting;

  // The attempt under way, if there is one.
  std::uint64_t attempt = 0;
  std::shared_ptr<Expirable> expiry;
  Clock::time_point attempt_deadline;
  std::shared_ptr<Dial> dial;
  SideMessage question;
  bool yielded = false;      ///< Told by the peer that its own dial counts.
  bool gave_yield = false;   ///< Told the peer that this side's dial counts.

  std::shared_ptr<Link> link;
  std::shared_ptr<const PeerDescription> description;  ///< Of the latest link; null if there never was one.
  std::uint64_t acknowledged_incarnation = 0;
  Clock::time_point out_of_use_since;  ///< Of an unconnected one.
  Failure last_failure;
};

/// Something to be done at a time unless the attempt is over by then.
struct PeerDirectory::Expiry final : Expirable {
  explicit Expiry(std::function<void()> what) : run(std::move(what)) {}
  void expire() override { run(); }

  std::function<void()> run;
};

class PeerDirectory::Host final : public LinkHost {
 public:
  Host(std::weak_ptr<PeerDirectory> directory, std::shared_ptr<NotificationQueue> notifications,
       std::span<const MemoryRegion> regions, PeerDescription peer)
      : directory_(std::move(directory)),
        notifications_(std::move(notifications)),
        regions_(regions.begin(), regions.end()),
        peer_(std::make_shared<const PeerDescription>(std::move(peer))) {}

  [[nodiscard]] const PeerDescription& peer() const noexcept override { return *peer_; }
  [[nodiscard]] std::span<const MemoryRegion> local_regions() const noexcept override { return regions_; }

  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload) override {
    return notifications_->push({peer_->id, std::move(payload), peer_->incarnation});
  }

  void link_failed(const Link& link, std::error_code cause) override {
    failed_ = true;
    if (const auto directory = directory_.lock()) {
      directory->link_failed(peer_->id, link, cause);
    }
  }

  [[nodiscard]] std::shared_ptr<const PeerDescription> description() const { return peer_; }
  [[nodiscard]] bool failed() const noexcept { return failed_; }

 private:
  const std::weak_ptr<PeerDirectory> directory_;
  const std::shared_ptr<NotificationQueue> notifications_;
  const std::vector<MemoryRegion> regions_;
  const std::shared_ptr<const PeerDescription> peer_;
  std::atomic<bool> failed_{false};
};

/// While it lasts, `close` waits. To be begun with the directory's mutex held, before it is closed, and ended without.
class PeerDirectory::Stay {
 public:
  explicit Stay(PeerDirectory& directory) : directory_(directory) { ++directory_.visits_; }
  Stay(const Stay&) = delete;
  Stay& operator=(const Stay&) = delete;
  ~Stay() {
    const Lock lock(directory_.mutex_);
    if (--directory_.visits_ == 0) {
      directory_.no_visits_.notify_all();
    }
  }

 private:
  PeerDirectory& directory_;
};

/// A callback's stay in the directory: `close` waits for those that have begun and lets no more in.
class PeerDirectory::Visit {
 public:
  explicit Visit(const std::weak_ptr<PeerDirectory>& weak) : directory_(weak.lock()) {
    if (directory_) {
      const Lock lock(directory_->mutex_);
      if (directory_->closed_) {
        left_ = std::move(directory_);
      } else {
        stay_.emplace(*directory_);
      }
    }
  }

  explicit operator bool() const noexcept { return directory_ != nullptr; }
  PeerDirectory* operator->() const noexcept { return directory_.get(); }

 private:
  std::shared_ptr<PeerDirectory> directory_;
  std::shared_ptr<PeerDirectory> left_;  ///< Not to be let go while its mutex is held.
  std::optional<Stay> stay_;
};

}  // namespace kvferry::kit
