// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
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

 private:
  /// A road of this side, in its order.
  struct Way {
    const OwnRoad* own = nullptr;
    std::unique_ptr<kit::Dial> dial;  ///< Null if it can't be tried.
    Bytes local_endpoint;
    Bytes remote_endpoint;
    kit::Failure failure;
    bool usual = false;
  };
  /// Shared by what the roads get, and not kept here: it keeps this attempt.
  using Handler = std::shared_ptr<kit::LinkHandler>;

  /// @param way from which on they are tried.
  void go_on(std::size_t way, const Handler& on_link);
  void ended(std::size_t way, RoadHost& host, const Handler& on_link, kit::Failure failure,
             std::shared_ptr<kit::Link> link);
  [[nodiscard]] Reasons reasons(std::size_t before) const;
  [[nodiscard]] kit::Clock::time_point deadline_of(std::size_t way) const;

  const std::shared_ptr<const OwnRoads> roads_;
  std::vector<Way> ways_;
  std::shared_ptr<kit::LinkHost> host_;
  kit::Clock::time_point deadline_;
};

}  // namespace kvferry::roads
