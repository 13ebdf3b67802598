// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>

#include <kvferry/error.hpp>

#include "message_reading.hpp"
#include "rail_checks.hpp"
#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

MessageHeader header_of(std::span<const std::byte> message) {
  MessageHeader header;
  std::memcpy(&header, message.data(), sizeof(header));
  return header;
}

/// Whether it hands something over or asks for something, rather than answers.
bool takes_something(MessageType type) {
  return type == MessageType::notify || type == MessageType::recv_post || type == MessageType::send_data ||
         type == MessageType::check_memory || type == MessageType::check_recv;
}

}  // namespace

std::error_code RailProtocol::violated(std::string how) {
  violation_ = std::move(how);
  return errc::protocol_violation;
}

RailProtocol::Transfer* RailProtocol::find(std::uint64_t id, TransferKind kind, std::error_code& ec) {
  const auto it = transfers_.find(id);
  if (it != transfers_.end() && it->second.request().kind == kind) {
    return &it->second;
  }
  if (it != transfers_.end() || id == 0 || id >= next_id_) {
    ec = violated("message for operation " + text(id) + ", which is no " + std::string(to_string(kind)));
  }
  return nullptr;
}

bool RailProtocol::greeted(std::span<const std::byte> message, MessageType type, std::uint64_t incarnation,
                           std::uint64_t rail) {
  if (message.size() < sizeof(MessageHeader)) {
    return false;
  }
  const MessageHeader header = header_of(message);
  if (check(header, message.size()) || header.type != type || header.operation != incarnation || header.tag != rail) {
    return false;
  }
  credits_ += header.credits;
  took_message();
  return true;
}

void RailProtocol::took_message() noexcept {
  ++owed_;
  ++taken_;
  // But for its last credit, which it keeps, the peer has none left.
  wants_buffers_ = wants_buffers_ || (may_grow_ && taken_ + 1 >= own_buffers_ && own_buffers_ < terms_.own_buffers);
}

std::error_code RailProtocol::check(const MessageHeader& header, std::size_t bytes) {
  if (header.magic != MessageHeader::expected_magic) {
    return violated("message with magic " + text(header.magic));
  }
  if (header.body_bytes != bytes - sizeof(header)) {
    return violated("message with " + text(bytes - sizeof(header)) + " bytes behind its header, which says " +
                    text(header.body_bytes));
  }
  if (header.credits > terms_.peer_buffers - credits_) {
    return violated(text(header.credits) + " receive buffers posted anew, of " + text(terms_.peer_buffers) +
                    " there were " + text(credits_) + " free");
  }
  return {};
}

std::error_code RailProtocol::received(std::span<const std::byte> message) {
  if (message.size() < sizeof(MessageHeader)) {
    return violated("message of " + text(message.size()) + " bytes");
  }
  const MessageHeader header = header_of(message);
  if (const auto ec = check(header, message.size())) {
    return ec;
  }
  // Else a peer could have this side take its messages without end.
  if (owed_ == own_buffers_) {
    return violated("a message though this side has no more than " + text(own_buffers_) +
                    " receive buffers, and has told of none that was posted anew");
  }
  credits_ += header.credits;
  took_message();
  const auto body = message.subspan(sizeof(header));
  if (leaving_ && takes_something(header.type)) {
    return {};
  }
  switch (header.type) {
    case MessageType::credit: return {};
    case MessageType::goodbye: return errc::peer_closed;
    case MessageType::notify: return end_notify(header, body);
    case MessageType::notify_ack: return end_notify_ack(header);
    case MessageType::recv_post: return end_recv_post(header, body);
    case MessageType::recv_cancel: return end_recv_cancel(header);
    case MessageType::recv_cancel_ack: return end_recv_cancel_ack(header);
    case MessageType::send_data: return end_send_data(header, body);
    case MessageType::send_ack: return end_send_ack(header);
    case MessageType::send_abort: return end_send_abort(header);
    case MessageType::fence: return end_fence(header);
    case MessageType::fence_ack: return end_fence_ack(header);
    case MessageType::region_added: return end_region_added(header, body);
    case MessageType::region_removed: return end_region_removed(header);
    case MessageType::region_removed_ack: return end_region_removed_ack(header);
    case MessageType::regions_question: return end_regions_question(header);
    case MessageType::regions_answer: return end_regions_answer(header);
    case MessageType::check_memory: return end_check_memory(header, body);
    case MessageType::check_recv: return end_check_recv(header, body);
    case MessageType::check_answer: return end_check_answer(header);
    case MessageType::hello:
    case MessageType::welcome: break;
  }
  return violated("message of unexpected type " + text(static_cast<std::uint64_t>(header.type)));
}

std::error_code RailProtocol::room_for_answer() {
  // Each of them becomes an answer.
  return control_.size() + fences_.size() + removals_.size() + questions_ + asked_.size() < max_queued_answers
             ? std::error_code()
             : violated("more than " + text(max_queued_answers) + " messages wait to be taken");
}

std::error_code RailProtocol::answer(const MessageHeader& header) {
  const auto ec = room_for_answer();
  if (!ec) {
    tell(header);
  }
  return ec;
}

std::optional<kit::Clock::time_point> RailProtocol::unfinished_since() const {
  const auto& list = assembly_clock_.since();
  const auto& notification = notification_clock_.since();
  return list && notification ? std::min(*list, *notification) : list ? list : notification;
}

std::error_code RailProtocol::end_notify(const MessageHeader& header, std::span<const std::byte> body) {
  if (header.first == 0) {
    notification_.clear();
    notification_clock_.stop();
    notification_of_ = header.operation;
  }
  const bool last = (header.flags & MessageHeader::last) != 0;
  const std::size_t size = notification_.size() + body.size();
  if (header.operation != notification_of_ || header.first != notification_.size() || header.total == 0 ||
      header.total > max_notification_bytes || size > header.total || last != (size == header.total)) {
    return violated("notification with bytes " + text(header.first) + " to " + text(header.first + body.size()) +
                    " of " + text(header.total) + " after " + text(notification_.size()));
  }
  notification_.insert(notification_.end(), body.begin(), body.end());
  notification_clock_.came(body.size(), last);
  if (!last) {
    return {};
  }
  MessageHeader ack;
  ack.type = MessageType::notify_ack;
  ack.operation = header.operation;
  if (!host_->deliver_notification(std::exchange(notification_, {}), header.tag)) {
    ack.status = static_cast<std::uint32_t>(errc::resource_limit);
  }
  return answer(ack);
}

std::error_code RailProtocol::end_notify_ack(const MessageHeader& header) {
  std::error_code ec;
  Transfer* const write = find_notifier(header.operation, ec);
  if (write == nullptr || (write->state == State::stopping && !write->answer_awaited)) {
    return ec;
  }
  if (!told_all(*write)) {
    return violated("acknowledgement of a notification that wasn't sent");
  }
  write->notification_done = true;
  write->answer_awaited = false;
  write->failure = status_code(header.status);
  if (write->failure) {
    write->why = "the peer's queue of notifications is full; the data has landed";
  }
  if (write->parts_done) {
    end(*write, write->failure, std::move(write->why));
  } else {
    end_if_done(*write);
  }
  return {};
}

RailProtocol::Transfer* RailProtocol::find_notifier(std::uint64_t id, std::error_code& ec) {
  const auto it = transfers_.find(id);
  const bool is_read = it != transfers_.end() && it->second.request().kind == TransferKind::read && told_all(it->second);
  return find(id, is_read ? TransferKind::read : TransferKind::write, ec);
}

std::error_code RailProtocol::end_fence(const MessageHeader& header) {
  const auto ec = room_for_answer();
  if (!ec) {
    fences_.push_back({header.operation, 0, 0});
  }
  return ec;
}

std::error_code RailProtocol::end_fence_ack(const MessageHeader& header) {
  auto fence = own_fences_.extract(header.operation);
  if (fence.empty()) {
    return violated("answer to fence " + std::to_string(header.operation) + ", which there wasn't");
  }
  fence.mapped()();
  return {};
}

std::error_code RailProtocol::end_recv_post(const MessageHeader& header, std::span<const std::byte> body) {
  if (header.count == 0 || body.size() != header.count * sizeof(PostedBuffer) ||
      header.total > kit::max_paired_objects) {
    return violated("recv with " + text(header.count) + " of " + text(header.total) + " buffers in " +
                    text(body.size()) + " bytes");
  }
  if (header.first == 0) {
    if (header.operation <= last_posted_) {
      return violated("recv " + text(header.operation) + " posted after recv " + text(last_posted_));
    }
    last_posted_ = header.operation;
    forget_assembly();
    assembly_.recv = header.operation;
    assembly_.tag = header.tag;
    assembly_.post.checked = (header.flags & MessageHeader::checked) != 0;
    if (assembly_.post.checked && terms_.checks == 0) {
      return violated("recv " + text(header.operation) + " with checksums, of a side that has none");
    }
  }
  if (header.operation != assembly_.recv || header.tag != assembly_.tag || header.first != assembly_.count) {
    return violated("recv " + text(header.operation) + " goes on with buffer " + text(header.first) + " after buffer " +
                    text(assembly_.count) + " of recv " + text(assembly_.recv));
  }
  const std::size_t size = assembly_.count + header.count;
  const bool last = (header.flags & MessageHeader::last) != 0;
  if (size > header.total || last != (size == header.total)) {
    return violated("recv of " + text(header.total) + " buffers with " + text(size));
  }
  // One message has no more than a receive buffer holds.
  if (!assembly_.refused && header.first != 0 && !assembly_memory_.take(body.size())) {
    assembly_.refused = true;
    std::vector<PostedBuffer>().swap(assembly_.post.buffers);
  }
  if (!assembly_.refused) {
    assembly_.post.buffers.resize(size);
    std::memcpy(assembly_.post.buffers.data() + assembly_.count, body.data(), body.size());
  }
  assembly_.count = size;
  assembly_clock_.came(body.size(), last);
  if (!last) {
    return {};
  }
  auto post = std::move(assembly_.post);
  const bool refused = assembly_.refused;
  forget_assembly();
  if (!refused && matcher_.add_post(header.tag, header.operation, std::move(post))) {
    match(header.tag);
    return {};
  }
  MessageHeader abort;
  abort.type = MessageType::send_abort;
  abort.operation = header.operation;
  abort.status = static_cast<std::uint32_t>(errc::resource_limit);
  return answer(abort);
}

void RailProtocol::forget_assembly() {
  assembly_ = {};
  assembly_clock_.stop();
  assembly_memory_.clear();
}

std::error_code RailProtocol::end_recv_cancel(const MessageHeader& header) {
  MessageHeader ack;
  ack.type = MessageType::recv_cancel_ack;
  ack.operation = header.operation;
  if (assembly_.recv == header.operation) {
    forget_assembly();
    return answer(ack);
  }
  if (matcher_.remove_post(header.tag, header.operation)) {
    return answer(ack);
  }
  const auto met = sends_by_recv_.find(header.operation);
  if (met == sends_by_recv_.end()) {
    return answer(ack);
  }
  Transfer& send = transfers_.at(met->second);
  if (send.state == State::told || send.answer_awaited) {
    return {};  // the receiver has everything, or answers that it didn't take it
  }
  // The acknowledgement goes out behind the writes into the recv's buffers that are under way; no others follow.
  if (const auto ec = answer(ack)) {
    return ec;
  }
  lose_recv(send);
  return {};
}

std::error_code RailProtocol::end_recv_cancel_ack(const MessageHeader& header) {
  std::error_code ec;
  Transfer* const recv = find(header.operation, TransferKind::recv, ec);
  if (recv != nullptr && recv->state == State::stopping) {
    end(*recv, recv->failure, std::move(recv->why));
  }
  return ec;
}

}  // namespace kvferry::rdma
