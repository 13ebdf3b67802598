// SPDX-License-Identifier: Apache-2.0
// A peer's messages about sends: their bytes, and how they have ended.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include <kvferry/error.hpp>

#include "message_reading.hpp"
#include "rail_checks.hpp"
#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

std::error_code RailProtocol::end_send_data(const MessageHeader& header, std::span<const std::byte> body) {
  std::error_code ec;
  Transfer* const recv = find(header.operation, TransferKind::recv, ec);
  if (ec) {
    return ec;
  }
  const bool last = (header.flags & MessageHeader::last) != 0;
  MessageHeader ack;
  ack.type = MessageType::send_ack;
  ack.operation = header.tag;
  if (recv == nullptr) {
    ack.status = static_cast<std::uint32_t>(errc::peer_cancelled);
    return last ? answer(ack) : std::error_code();
  }
  const bool checked = (header.flags & MessageHeader::checked) != 0;
  Checks& checks = recv->checks;
  if (!checks.on && checked && terms_.checks != 0 && recv->next_object == 0 && recv->next_offset == 0) {
    checks.on = true;
    checks.came.resize(recv->request().objects.size());
  }
  if (checks.on != checked || checks.complete || (!checked && recv->request().checksums.value_or(false))) {
    return violated("send data with or without checksums for recv " + text(header.operation) + ", or too much of it");
  }
  for (std::uint32_t i = 0; i < header.count; ++i) {
    if (const auto wrong = take_sent_object(*recv, body)) {
      return wrong;
    }
  }
  const std::size_t count = recv->request().objects.size();
  const bool all = recv->next_object == count && recv->next_offset == 0;
  if (!body.empty() || (last != all && (last || !checked))) {
    return violated("send data up to object " + text(recv->next_object) + " of " + text(count) + ", with " +
                    text(body.size()) + " bytes left");
  }
  if (!last) {
    return {};
  }
  if (checked) {
    skip_what_needs_none(*recv, checks.next, count);
    if (checks.next.object != count) {
      return violated("recv " + text(header.operation) + " has no checksums from object " + text(checks.next.object) +
                      " on");
    }
    if (const auto full = room_for_answer()) {
      return full;
    }
    recv->sent_as = header.tag;
    checks.complete = true;
    if (checks.unanswered == 0) {
      end_checked_recv(*recv);
    }
    return {};
  }
  ec = answer(ack);
  end(*recv, {}, std::move(recv->why));
  return ec;
}

std::error_code RailProtocol::take_sent_object(Transfer& recv, std::span<const std::byte>& body) {
  const auto& objects = recv.request().objects;
  std::uint64_t entry = 0;
  if (body.size() < sizeof(entry) || recv.next_object >= objects.size()) {
    return violated("send data for object " + text(recv.next_object) + " of " + text(objects.size()) + " in " +
                    text(body.size()) + " bytes");
  }
  std::memcpy(&entry, body.data(), sizeof(entry));
  body = body.subspan(sizeof(entry));
  const std::size_t object = recv.next_object;
  const MutableBuffer buffer = objects[object];
  const std::uint64_t length = entry & SentObject::length_mask;
  const bool refused = (entry & SentObject::refused) != 0;
  const bool direct = (entry & SentObject::direct) != 0;
  kit::Operation& operation = recv.operation();
  if (refused || direct) {
    if (recv.next_offset != 0 ||
        (direct && (refused || length > buffer.size() || recv.offered->posted()[object].direct == 0))) {
      return violated("object " + text(object) + " said to have been written with " + text(length) + " bytes");
    }
    if (recv.checks.on) {
      recv.checks.came[object] = refused ? nothing_came : length;
    }
    if (refused) {
      operation.set_size(object, static_cast<std::size_t>(length));
      operation.failed(object, errc::buffer_too_small);
      recv.why = "object " + text(object) + " has " + text(length) + " bytes, its buffer " + text(buffer.size());
    } else if (!recv.checks.on) {
      operation.received(object, static_cast<std::size_t>(length));
    }
    ++recv.next_object;
    return {};
  }
  if (length > body.size() || length > buffer.size() - recv.next_offset) {
    return violated("object " + text(object) + " sent with " + text(length) + " bytes at offset " +
                    text(recv.next_offset) + " for a buffer of " + text(buffer.size()));
  }
  const auto size = static_cast<std::size_t>(length);
  if (size != 0) {
    std::memcpy(buffer.data() + recv.next_offset, body.data(), size);
  }
  body = body.subspan(size);
  recv.next_offset += size;
  if ((entry & SentObject::continues) == 0) {
    if (recv.checks.on) {
      recv.checks.came[object] = recv.next_offset;
    } else {
      operation.received(object, recv.next_offset);
    }
    ++recv.next_object;
    recv.next_offset = 0;
  }
  return {};
}

std::error_code RailProtocol::end_send_ack(const MessageHeader& header) {
  const auto it = sends_by_attempt_.find(header.operation);
  if (it == sends_by_attempt_.end()) {
    return header.operation == 0 || header.operation >= next_id_
               ? violated("acknowledgement of send " + text(header.operation) + ", which there wasn't")
               : std::error_code();
  }
  Transfer& send = transfers_.at(it->second);
  const bool stopping = send.state == State::stopping;
  if ((send.state != State::told && !stopping) || send.acknowledged) {
    return violated("acknowledgement of send " + std::to_string(header.operation) + " before all of it was sent");
  }
  const auto status = status_code(header.status);
  if (status && status != errc::peer_cancelled) {
    return violated("acknowledgement of send " + text(header.operation) + " with status " + text(header.status));
  }
  if (!status && send.next_object != send.objects().size()) {
    return violated("acknowledgement of send " + text(header.operation) + ", which was given up before all was sent");
  }
  if (!status && (send.checks.unanswered != 0 || (send.checks.on && !all_asked(send)))) {
    return violated("acknowledgement of send " + text(header.operation) + " before its checksums were compared");
  }
  send.answer_awaited = false;
  if (status) {
    if (stopping) {
      end_if_done(send);
    } else {
      lose_recv(send);
    }
    return {};
  }
  if (stopping) {
    send.failure = {};  // all of it has arrived
  }
  send.acknowledged = true;
  const std::size_t count = send.request().objects.size();
  if (send.checks.on) {
    decide_send(send);
  } else if (send.refused.empty()) {
    send.operation().landed(0, count);
  } else {
    for (std::size_t i = 0; i < count; ++i) {
      if (!send.refused[i]) {
        send.operation().landed(i, 1);
      }
    }
  }
  end_if_done(send);
  return {};
}

std::error_code RailProtocol::end_send_abort(const MessageHeader& header) {
  std::error_code ec;
  Transfer* const recv = find(header.operation, TransferKind::recv, ec);
  if (!ec && header.tag != 0) {
    MessageHeader ack;
    ack.type = MessageType::send_ack;
    ack.operation = header.tag;
    ack.status = static_cast<std::uint32_t>(errc::peer_cancelled);
    ec = answer(ack);
  }
  if (recv == nullptr || ec) {
    return ec;
  }
  if (recv->state == State::stopping) {
    end(*recv, recv->failure, std::move(recv->why));
    return {};
  }
  const auto status = status_code(header.status);
  std::string why = "the peer's send was cancelled or timed out";
  if (status == errc::count_mismatch) {
    why = "tag " + text(recv->request().tag) + ": the recv has " + text(recv->request().objects.size()) +
          " objects, the peer's send " + text(header.count);
  }
  end(*recv, status ? status : std::error_code(errc::peer_cancelled), std::move(why));
  return {};
}

}  // namespace kvferry::rdma
