// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

/// A road in the handshake: what its transport tells the peer, or why it can't be taken.
struct RoadOffer {
  std::string name;
  Bytes endpoint;
  std::string why;        ///< Empty: it can be taken.
  std::int64_t code = 0;  ///< Of `why`: an `errc`.

  static constexpr std::string_view side_message_type = "KvferryRoad";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("name", &RoadOffer::name),
                      side_message_field("endpoint", &RoadOffer::endpoint), side_message_field("why", &RoadOffer::why),
                      side_message_field("code", &RoadOffer::code));
  }

  /// Why the peer doesn't take it.
  [[nodiscard]] kit::Failure failure() const { return {kit::code_of({code, why}), why}; }
};

/// One that can't be taken.
[[nodiscard]] inline RoadOffer not_offered(std::string name, const kit::Failure& failure) {
  const std::string why = failure.sentence.empty() ? failure.code.message() : failure.sentence;
  return {std::move(name), {}, escaped(why, 300), static_cast<std::int64_t>(kit::code_for_peer(failure.code))};
}

/// The endpoint of a channel that has several roads; in the question all that this side has, the best first, in the
/// answer those of them that the other has as well.
struct RoadOffers {
  /// Names the asking side's host as long as it is up; empty where that isn't known. In the answer it is there if
  /// both sides are on that host: nobody is told another's.
  std::string host;
  std::vector<RoadOffer> roads;

  static constexpr std::string_view side_message_type = "KvferryRoads";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("host", &RoadOffers::host), side_message_field("roads", &RoadOffers::roads));
  }
};

}  // namespace kvferry::roads
