// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <kvferry/auto/own_roads.hpp>
#include <kvferry/auto/road_host.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

/// An attempt over all roads that both sides have, one after the other, until one gets through.
class RoadDial final : public kit::Dial {
 public:
  /// @throws TransferError `errc::no_path` if no road can be tried.
  RoadDial(std::shared_ptr<const OwnRoads> roads, const std::string& peer_id);

  [[nodiscard]] Bytes local_endpoint() override;
  void connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint, kit::Clock::time_point deadline,
               kit::LinkHandler on_link) override;
  [[nodiscard]] std::string awaited() const override { return progress_->described(); }
  [[nodiscard]] bool was_cut_off() const noexcept override;

 private:
  /// A road of this side, in its order.
  struct Way {
    const OwnRoad* own = nullptr;
    std::unique_ptr<kit::Dial> dial;  ///< Null if it can't be tried.
    Bytes local_endpoint;
    Bytes remote_endpoint;
    kit::Failure failure;
    Reasons::Kind kind = Reasons::Kind::missing;

    void fail(kit::Failure cause);
  };
  /// How far the attempt is. Apart from it, because who may abandon it doesn't keep it. Thread-safe.
  class Progress {
   public:
    /// @return false if the attempt isn't wanted any more: then `road` isn't to be taken.
    [[nodiscard]] bool go_to(std::shared_ptr<RoadHost> road, std::string described);
    [[nodiscard]] bool is_over();
    [[nodiscard]] std::string described();
    void abandon();

   private:
    std::mutex mutex_;
    std::shared_ptr<RoadHost> current_;
    std::string described_;  ///< The current one, and why it isn't one before it.
    bool over_ = false;
  };
  /// Shared by what the roads get, and not kept here: it keeps this attempt.
  using Handler = std::shared_ptr<kit::LinkHandler>;

  /// @param way from which on they are tried.
  void go_on(std::size_t way, const Handler& on_link);
  void ended(std::size_t way, RoadHost& host, const Handler& on_link, kit::Failure failure,
             std::shared_ptr<kit::Link> link);
  void give_up(std::size_t before, const Handler& on_link) const;
  [[nodiscard]] Reasons reasons(std::size_t before) const;
  [[nodiscard]] kit::Clock::time_point deadline_of(std::size_t way) const;

  const std::shared_ptr<const OwnRoads> roads_;
  const std::shared_ptr<Progress> progress_ = std::make_shared<Progress>();
  std::vector<Way> ways_;
  std::shared_ptr<kit::LinkHost> host_;
  kit::Clock::time_point deadline_;
};

}  // namespace kvferry::roads
