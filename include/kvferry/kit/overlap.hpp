// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_OVERLAP_HPP
#define KVFERRY_KIT_OVERLAP_HPP

#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Whether a one-sided batch puts bytes into the same place twice: objects into one page or overlapping ranges of the
/// peer's, or what it reads into buffers that overlap. (Ranges and buffers whose blocks interleave count as such.) Then
/// the order of its objects counts, and it must not be spread over connections that know no order among them.
[[nodiscard]] bool lands_on_itself(const TransferRequest& request);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_OVERLAP_HPP
