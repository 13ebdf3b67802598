// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <kvferry/auto/own_roads.hpp>
#include <kvferry/auto/road_host.hpp>
#include <kvferry/auto/road_offers.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

/// Awaits a peer's attempt on all roads that both sides have, and takes the one on which it comes.
class RoadAcceptance : public std::enable_shared_from_this<RoadAcceptance> {
 public:
  /// @param on_link called as `TransferChannelKit::accept` says, unless `begin` throws.
  RoadAcceptance(std::shared_ptr<const OwnRoads> roads, std::shared_ptr<kit::LinkHost> host, kit::LinkHandler on_link)
      : roads_(std::move(roads)), host_(std::move(host)), on_link_(std::move(on_link)) {}

  /// To be called once. @param asked what the peer has, the best first.
  /// @return the answer. @throws TransferError `errc::no_path`, ...: the peer can come on no road.
  [[nodiscard]] RoadOffers begin(const RoadOffers& asked, kit::Clock::time_point deadline);

 private:
  /// A road of the peer's, in its order.
  struct Way {
    std::string name;
    const OwnRoad* own = nullptr;
    std::shared_ptr<RoadHost> host;  ///< Null if it isn't awaited there.
    kit::Failure failure;
    Reasons::Kind kind = Reasons::Kind::missing;
  };

  void ended(std::size_t way, const kit::Failure& failure, const std::shared_ptr<kit::Link>& link);
  void take(std::size_t way, const std::shared_ptr<kit::Link>& link, const kit::LinkHandler& on_link);
  /// None but this one is awaited any more.
  void abandon_all_but(std::size_t way);
  [[nodiscard]] Reasons reasons(const Way* taken) const;
  static void add(Reasons& reasons, const Way& way);

  const std::shared_ptr<const OwnRoads> roads_;
  const std::shared_ptr<kit::LinkHost> host_;
  bool elsewhere_ = false;  ///< The peer is on another host. Settled by `begin`, as the ways are.
  std::vector<Way> ways_;  ///< Their number and hosts are settled before any is awaited.
  std::mutex mutex_;       ///< Guards what follows, and the failures.
  kit::LinkHandler on_link_;
  std::size_t pending_ = 1;  ///< Roads that may still bring a link; one for `begin`.
  bool over_ = false;
};

}  // namespace kvferry::roads
