// SPDX-License-Identifier: Apache-2.0
// How a send meets a recv of the peer's, and loses it again.
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

void RailProtocol::tell_recv_aborted(std::uint64_t recv, std::error_code cause, std::size_t count,
                                     std::uint64_t answer_to) {
  MessageHeader header;
  header.type = MessageType::send_abort;
  header.operation = recv;
  header.status = static_cast<std::uint32_t>(cause.value());
  header.count = static_cast<std::uint32_t>(count);
  header.tag = answer_to;
  tell(header);
}

void RailProtocol::match(std::uint64_t tag) {
  while (auto match = matcher_.match(tag)) {
    meet(transfers_.at(match->send), match->recv, std::move(match->post));
  }
}

void RailProtocol::meet(Transfer& send, std::uint64_t recv, Post post) {
  const auto objects = send.objects();
  send.sent_as = next_id_++;
  send.remote_recv = recv;
  sends_by_recv_.emplace(recv, send.id);
  sends_by_attempt_.emplace(send.sent_as, send.id);
  if (objects.size() != post.size()) {
    tell_recv_aborted(recv, errc::count_mismatch, objects.size());
    end_when_drained(send, errc::count_mismatch,
                     "tag " + std::to_string(send.request().tag) + ": the send has " + std::to_string(objects.size()) +
                         " objects, the peer's recv " + std::to_string(post.size()));
    return;
  }
  send.post = std::move(post.buffers);
  send.refused.clear();
  send.failure.clear();
  send.why.clear();
  begin_checks(send, post.checked);
  send.next_object = 0;
  send.next_offset = 0;
  std::vector<bool> not_direct(objects.size());
  for (std::size_t i = 0; i < objects.size(); ++i) {
    if (objects[i].size() > send.post[i].size) {
      send.refused.resize(objects.size());
      send.refused[i] = true;
      send.operation().failed(i, errc::buffer_too_small);
      if (send.why.empty()) {
        send.why = "object " + std::to_string(i) + " has " + std::to_string(objects[i].size()) +
                   " bytes, the peer's buffer " + std::to_string(send.post[i].size);
      }
    }
    not_direct[i] = objects[i].size() > send.post[i].size || !is_direct(send, i);
  }
  send.planner = WorkPlanner(kit::LocalBytes(objects, {}), send.range, RemoteMemory(send.post), std::move(not_direct));
  if (send.planner.done()) {
    planned_all(send);
  } else {
    send.state = State::moving;
    moving_.push_back(send.id);
  }
}

/// The recv that a send met was cancelled or timed out, perhaps before the two met: the send goes to the next one.
void RailProtocol::lose_recv(Transfer& send) {
  forget_meeting(send);
  send.checks = {};
  send.operation().start_over();
  send.state = State::matching;
  matcher_.add_send(send.request().tag, send.id, send.id);
  match(send.request().tag);
}

/// The send is no longer one that waits for a recv or has met one.
void RailProtocol::forget_meeting(Transfer& transfer) {
  if (transfer.request().kind != TransferKind::send) {
    return;
  }
  if (transfer.remote_recv != 0) {
    sends_by_recv_.erase(transfer.remote_recv);
    sends_by_attempt_.erase(transfer.sent_as);
    transfer.remote_recv = 0;
  } else {
    matcher_.remove_send(transfer.request().tag, transfer.id);
  }
}

}  // namespace kvferry::rdma
