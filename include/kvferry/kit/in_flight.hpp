// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_IN_FLIGHT_HPP
#define KVFERRY_KIT_IN_FLIGHT_HPP

#include <system_error>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The error of a write or send whose connection is broken with `cause` before the peer has dealt with it:
/// `condition::may_still_land` holds for it. If another incarnation has taken the place of the receiving peer, the
/// former one may still live and process the bytes that have reached it.
[[nodiscard]] inline std::error_code in_flight(const std::error_code& cause) noexcept {
  if (cause == condition::may_still_land) {
    return cause;
  }
  if (cause == errc::peer_restarted) {
    return errc::peer_restarted_in_flight;
  }
  if (cause == errc::closed) {
    return errc::closed_in_flight;
  }
  if (cause == condition::cancelled) {
    return errc::cancelled_in_flight;
  }
  return cause == errc::timed_out ? errc::timed_out_in_flight : errc::connection_lost;
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_IN_FLIGHT_HPP
