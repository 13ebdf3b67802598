// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/transfer_spec.hpp>

#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Appends the descriptors for `length` bytes of a range, from byte `from` of it on: at most as many descriptors as
/// those bytes have pieces of memory, and at least one.
void describe_range(const RemoteRange& range, std::uint64_t from, std::uint64_t length,
                    std::vector<Descriptor>& descriptors);

/// A frame with ranges, decoded.
struct RangesRead {
  std::string violation;   ///< Not empty: the frame is invalid.
  std::error_code status;  ///< The frame is refused, and there are no pieces.
};

/// Finds the memory of a frame with ranges, and appends its pieces. Checks everything that a peer could have wrong.
[[nodiscard]] RangesRead read_ranges(const FrameHeader& header, std::span<const Descriptor> descriptors,
                                     const kit::RegionList& regions, Access needed, std::vector<iovec>& pieces);

}  // namespace kvferry::tcp
