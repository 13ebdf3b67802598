// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <kvferry/config.hpp>
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
};

/// All roads of a channel, the best first, and what their attempts share.
struct OwnRoads {
  std::vector<OwnRoad> roads;
  std::string host;  ///< Names this host as long as it is up; empty if that isn't known.
  std::shared_ptr<kit::Logger> logger;

  /// Null if there is none of this name.
  [[nodiscard]] const OwnRoad* find(const std::string& name) const;
};

/// A name that all processes of this host get alike, and those of others don't. Empty if the system has none.
[[nodiscard]] std::string name_of_host();

/// Why roads were not taken.
class Reasons {
 public:
  /// @param failure a sentence of this side's, or of the peer's.
  /// @param usual nobody need be warned of it: a road within a host doesn't lead to another.
  void add(const std::string& road, const kit::Failure& failure, bool usual = false);

  /// "not shm: the peer is on another host; not rdma: ..."; empty if there is none.
  [[nodiscard]] std::string sentence() const;
  [[nodiscard]] bool usual() const noexcept { return usual_; }
  /// What an attempt ends with that no road has come to the end of: the last error, if trying again won't mend that,
  /// or it isn't the road's; else `errc::no_path`.
  [[nodiscard]] kit::Failure failure(const std::string& peer_id) const;

 private:
  std::string sentence_;
  std::error_code last_;
  bool usual_ = true;
};

/// Why a road isn't tried: it is one within a host, or the peer hasn't got it.
[[nodiscard]] kit::Failure on_another_host();
[[nodiscard]] kit::Failure not_offered();

/// Tells the link and the log why it is this one.
void say_why(const OwnRoads& roads, const std::string& peer_id, kit::Link& link, const std::string& taken,
             const Reasons& others);

}  // namespace kvferry::roads
