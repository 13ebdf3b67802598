// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/frame.hpp>
#include "fuzz/enumerators.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// A type that is added to the protocol doesn't compile until it stands here, and is then in `frame_types`.
constexpr bool is_frame_type(FrameType type) {
  switch (type) {
    case FrameType::write:
    case FrameType::write_ack:
    case FrameType::notify:
    case FrameType::read:
    case FrameType::read_data:
    case FrameType::recv_post:
    case FrameType::recv_cancel:
    case FrameType::send_data:
    case FrameType::send_ack:
    case FrameType::send_abort:
    case FrameType::probe:
    case FrameType::probe_answer:
    case FrameType::fence:
    case FrameType::fence_ack:
    case FrameType::region_added:
    case FrameType::region_removed:
    case FrameType::region_removed_ack:
    case FrameType::region_shared:
    case FrameType::region_mapped: return true;
  }
  return false;
}

inline constexpr auto frame_types = fuzz::enumerators<FrameType, is_frame_type>();

}  // namespace kvferry::tcp::testing
