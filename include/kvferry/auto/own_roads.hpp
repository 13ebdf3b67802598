// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/road.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

/// A road of this side.
struct OwnRoad {
  std::string name;
  bool within_host = false;
  kit::Road* road =
      nullptr;      ///< For the channel's hooks alone: it may be gone later. Null if this host doesn't have it.
  std::string why;  ///< It doesn't.

  struct Counters {
    std::atomic<std::uint64_t> taken{0};
    std::atomic<std::uint64_t> fallbacks{0};
  };
  std::shared_ptr<Counters> counters = std::make_shared<Counters>();
};

/// All roads of a channel, the best first, and what their attempts share.
struct OwnRoads {
  std::vector<OwnRoad> roads;
  std::string host;  ///< Names this host as long as it is up; empty if that isn't known.
  std::shared_ptr<kit::Logger> logger;
  std::chrono::milliseconds patience{};  ///< With a road behind which there are others.

  /// Null if there is none of this name.
  [[nodiscard]] const OwnRoad* find(const std::string& name) const;
  /// When the last of so many roads is tried at the latest, if the others don't answer.
  [[nodiscard]] kit::Clock::time_point last_tried_by(std::size_t roads_tried, kit::Clock::time_point deadline) const;
};

/// A name that all processes of this host get alike, and those of others don't. Empty if the system has none.
[[nodiscard]] std::string name_of_host();

/// Why roads were not taken.
class Reasons {
 public:
  /// How much a reason says about the attempt, the least first.
  enum class Kind {
    usual,        ///< Nobody need be warned of it: a road within a host doesn't lead to another.
    missing,      ///< One side doesn't have the road, or the other did not come on it.
    within_host,  ///< Two processes of one host don't meet, which says nothing of other roads: they are of different users.
    tried,
  };

  /// @param failure a sentence of this side's, or of the peer's.
  void add(const std::string& road, const kit::Failure& failure, Kind kind);

  /// "not shm: the peer is on another host; not rdma: ..."; empty if there is none.
  [[nodiscard]] std::string sentence() const;
  [[nodiscard]] bool usual() const noexcept { return usual_; }
  /// The error of an attempt that no road has brought to its end: the first error that trying again doesn't mend; else
  /// the last, of a road that was tried, if it isn't the road's; else `errc::no_path`.
  [[nodiscard]] kit::Failure failure(const std::string& peer_id) const;

 private:
  /// The least first.
  enum class Weight { none, within_host, tried, lasting };

  std::string sentence_;
  std::error_code code_;  ///< The one that says most.
  Weight weight_ = Weight::none;
  bool usual_ = true;
};

/// @param cause of the road's failure, here or at the peer.
[[nodiscard]] inline Reasons::Kind kind_of(const OwnRoad& road, const std::error_code& cause) {
  if (cause == errc::no_path) {
    return Reasons::Kind::missing;
  }
  return road.within_host ? Reasons::Kind::within_host : Reasons::Kind::tried;
}

/// Why a road isn't tried: it is one within a host, or the peer hasn't got it.
[[nodiscard]] kit::Failure on_another_host();
/// Or nobody knows whether it is one within a host, because this side's system has no name for it, or the peer's hasn't.
[[nodiscard]] kit::Failure on_unnamed_host();
[[nodiscard]] kit::Failure peer_on_unnamed_host();
[[nodiscard]] kit::Failure not_offered();

/// Tells the link why it is this one, and once it is the peer's, the log and the counters.
/// @param taken one of `roads`.
void say_why(const std::shared_ptr<const OwnRoads>& roads, const std::string& peer_id, kit::Link& link,
             const OwnRoad& taken, const Reasons& others);

}  // namespace kvferry::roads
