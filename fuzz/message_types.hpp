// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fuzz/enumerators.hpp"
#include "rdma/message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

/// A type that is added to the protocol doesn't compile until it stands here, and is then in `message_types`.
constexpr bool is_message_type(MessageType type) {
  switch (type) {
    case MessageType::hello:
    case MessageType::welcome:
    case MessageType::credit:
    case MessageType::goodbye:
    case MessageType::notify:
    case MessageType::notify_ack:
    case MessageType::recv_post:
    case MessageType::recv_cancel:
    case MessageType::recv_cancel_ack:
    case MessageType::send_data:
    case MessageType::send_ack:
    case MessageType::send_abort:
    case MessageType::fence:
    case MessageType::fence_ack:
    case MessageType::region_added:
    case MessageType::region_removed:
    case MessageType::region_removed_ack:
    case MessageType::regions_question:
    case MessageType::regions_answer:
    case MessageType::check_memory:
    case MessageType::check_recv:
    case MessageType::check_answer: return true;
  }
  return false;
}

inline constexpr auto message_types = fuzz::enumerators<MessageType, is_message_type>();

}  // namespace kvferry::rdma::testing
