// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_OVERLAP_HPP
#define KVFERRY_KIT_OVERLAP_HPP

#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Whether a one-sided batch puts bytes into the same place twice: it writes objects to one page or to overlapping
/// ranges, or reads into buffers that overlap. (Ranges and buffers whose blocks interleave count as overlapping.) Then
/// the order of its objects matters, and it must not be spread over connections without a common order.
[[nodiscard]] bool lands_on_itself(const TransferRequest& request);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_OVERLAP_HPP
