// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>

#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// Bytes with the adapter at a time: enough for any network to be full, few enough to be gone soon when an operation is
/// stopped.
constexpr std::size_t window_bytes = std::size_t{8} << 20;
/// The window's share, and that of the queue's places, at which a list ends. A list completes as a whole: with one for all of the
/// window nothing would be under way until the next one is posted.
constexpr std::size_t lists_in_window = 4;
/// The most that an operation posts before it is another one's turn.
constexpr std::size_t turn_bytes = std::size_t{1} << 20;
constexpr std::size_t turn_requests = 32;
/// Places in the queue besides those for operations: for a probe, a goodbye.
constexpr std::size_t reserved_requests = 2;

ibv_wr_opcode opcode_of(TransferKind kind) { return kind == TransferKind::read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE; }

}  // namespace

bool RailProtocol::fill(WorkList& list) {
  list.clear();
  const std::size_t most_requests = std::max<std::size_t>(terms_.queue_depth / lists_in_window, 1);
  while (list.has_request() && list.has_piece() && posted_ < terms_.queue_depth && list.size() < most_requests &&
         list.bytes() < window_bytes / lists_in_window) {
    if (!add_message(list) && (posted_bytes_ >= window_bytes || !add_work(list, most_requests))) {
      break;
    }
  }
  if (list.empty() && owed_ >= own_buffers_ / 2) {
    // The peer goes on, though it is answered nothing: it would go on faster if there were more.
    wants_buffers_ = wants_buffers_ || (may_grow_ && taken_ >= own_buffers_ / 2 && own_buffers_ < terms_.own_buffers);
    return fill_message(list, MessageType::credit, 0, 0);
  }
  if (list.empty()) {
    return false;
  }
  records_.back().ends_list = true;
  return true;
}

double RailProtocol::window_used() const noexcept {
  return std::max(static_cast<double>(posted_bytes_) / static_cast<double>(window_bytes),
                  static_cast<double>(posted_) / static_cast<double>(terms_.queue_depth));
}

bool RailProtocol::fill_probe(WorkList& list, std::function<void()> answered) {
  list.clear();
  if (posted_ >= terms_.queue_depth + reserved_requests) {
    return false;
  }
  list.add_request(IBV_WR_RDMA_WRITE).wr_id = 0;
  add_record(list, {.requests = 1});
  records_.back().ends_list = true;
  if (answered) {
    records_.back().probe = true;
    probes_.push_back(std::move(answered));
  }
  return true;
}

bool RailProtocol::fill_message(WorkList& list, MessageType type, std::uint64_t operation, std::uint64_t tag) {
  list.clear();
  // The last credit is for these: there must always be one for the message that returns credits.
  if (credits_ == 0 || free_slots_.empty() || posted_ >= terms_.queue_depth + reserved_requests) {
    return false;
  }
  MessageHeader header;
  header.type = type;
  header.operation = operation;
  header.tag = tag;
  end_message(list, header);
  records_.back().ends_list = true;
  return true;
}

bool RailProtocol::fill_answers(WorkList& list) {
  list.clear();
  // Within the queue's depth, as they come behind what operations have posted.
  while (!control_.empty() && list.has_request() && posted_ < terms_.queue_depth && begin_message() != nullptr) {
    end_message(list, control_.front());
    control_.pop_front();
  }
  if (list.empty()) {
    // The peer may be leaving as well, with answers that wait for these as this side's wait for the peer's.
    return !control_.empty() && owed_ >= own_buffers_ / 2 && fill_message(list, MessageType::credit, 0, 0);
  }
  records_.back().ends_list = true;
  return true;
}

void RailProtocol::add_record(WorkList& list, Record record) {
  posted_ += record.requests;
  posted_bytes_ += record.bytes;
  for (std::size_t i = list.size() - record.requests; i < list.size(); ++i) {
    list[i].wr_id = record.transfer;
  }
  records_.push_back(record);
  ++recorded_;
}

bool RailProtocol::messages_wait() const noexcept {
  return !control_.empty() || !news_.empty() || !recv_posts_.empty() || !notifications_.empty() ||
         !questions_ready_.empty() || !telling_.empty();
}

std::byte* RailProtocol::begin_message() {
  if (credits_ < 2) {
    return nullptr;
  }
  if (free_slots_.empty()) {
    wants_slots_ = may_grow_ && slots_.size() < terms_.most_slots && messages_wait();
    return nullptr;
  }
  return slots_[free_slots_.back()].memory + sizeof(MessageHeader);
}

void RailProtocol::end_message(WorkList& list, MessageHeader header) {
  const std::size_t slot = free_slots_.back();
  free_slots_.pop_back();
  --credits_;
  header.credits = static_cast<std::uint16_t>(std::min<std::size_t>(owed_, 0xffff));
  owed_ -= header.credits;
  taken_ = 0;
  std::byte* const memory = slots_[slot].memory;
  std::memcpy(memory, &header, sizeof(header));
  const std::size_t size = sizeof(header) + header.body_bytes;
  ibv_send_wr& request = list.add_request(IBV_WR_SEND);
  list.add_piece(address_of(memory), size, slots_[slot].key);
  if (size <= terms_.max_inline) {
    request.send_flags |= IBV_SEND_INLINE;
  }
  list.bytes_written += size;
  add_record(list, {.requests = 1, .bytes = 0, .slot = slot, .has_slot = true});
}

bool RailProtocol::add_message(WorkList& list) {
  if (begin_message() == nullptr) {
    return false;
  }
  if (!control_.empty()) {
    end_message(list, control_.front());
    control_.pop_front();
    return true;
  }
  return add_news(list) || add_recv_post(list) || add_notification(list) || add_question(list) ||
         add_send_data(list);
}

bool RailProtocol::add_recv_post(WorkList& list) {
  while (!recv_posts_.empty()) {
    const auto it = transfers_.find(recv_posts_.front());
    if (it == transfers_.end() || it->second.state == State::stopping) {
      recv_posts_.pop_front();
      continue;
    }
    Transfer& recv = it->second;
    const auto& posted = recv.offered->posted();
    const std::size_t fit = (slot_bytes_ - sizeof(MessageHeader)) / sizeof(PostedBuffer);
    const std::size_t count = std::min(fit, posted.size() - recv.said);
    std::memcpy(begin_message(), posted.data() + recv.said, count * sizeof(PostedBuffer));
    MessageHeader header;
    header.type = MessageType::recv_post;
    header.flags = recv.request().checksums.value_or(false) ? MessageHeader::checked : std::uint8_t{0};
    header.operation = recv.id;
    header.tag = recv.request().tag;
    header.count = static_cast<std::uint32_t>(count);
    header.body_bytes = static_cast<std::uint32_t>(count * sizeof(PostedBuffer));
    header.first = recv.said;
    header.total = static_cast<std::uint32_t>(posted.size());
    recv.said += count;
    recv.recv_posted = true;
    if (recv.said == posted.size()) {
      header.flags |= MessageHeader::last;
      recv_posts_.pop_front();
    }
    end_message(list, header);
    return true;
  }
  return false;
}

bool RailProtocol::add_notification(WorkList& list) {
  while (!notifications_.empty()) {
    const auto it = transfers_.find(notifications_.front());
    if (it == transfers_.end() || (it->second.state == State::stopping && !notification_begun(it->second))) {
      notifications_.pop_front();
      continue;
    }
    Transfer& write = it->second;
    const auto& payload = write.request().notification;
    const std::size_t size = std::min(slot_bytes_ - sizeof(MessageHeader), payload.size() - write.said);
    std::memcpy(begin_message(), payload.data() + write.said, size);
    MessageHeader header;
    header.type = MessageType::notify;
    header.operation = write.id;
    header.tag = write.request().notification_key;
    header.body_bytes = static_cast<std::uint32_t>(size);
    header.first = write.said;
    header.total = static_cast<std::uint32_t>(payload.size());
    write.said += size;
    if (write.said == payload.size()) {
      header.flags |= MessageHeader::last;
      notifications_.pop_front();
    }
    end_message(list, header);
    return true;
  }
  return false;
}

bool RailProtocol::add_send_data(WorkList& list) {
  while (!telling_.empty()) {
    const auto it = transfers_.find(telling_.front());
    telling_.pop_front();
    if (it == transfers_.end() || it->second.state != State::telling) {
      continue;
    }
    Transfer& send = it->second;
    const auto objects = send.objects();
    if (send.checks.on && send.next_object == objects.size() && !all_asked(send)) {
      continue;  // what is left is its checksums
    }
    const std::size_t space = slot_bytes_ - sizeof(MessageHeader);
    std::byte* const body = begin_message();
    std::size_t used = 0;
    MessageHeader header;
    while (send.next_object < objects.size() && space - used >= sizeof(std::uint64_t)) {
      const MutableBuffer object = objects[send.next_object];
      const bool refused = !send.refused.empty() && send.refused[send.next_object];
      const bool direct = !refused && is_direct(send, send.next_object);
      std::uint64_t entry = object.size();
      std::size_t length = 0;
      if (refused || direct) {
        entry |= refused ? SentObject::refused : SentObject::direct;
      } else {
        const std::size_t rest = object.size() - send.next_offset;
        length = std::min(rest, space - used - sizeof(entry));
        if (length == 0 && rest != 0) {
          break;
        }
        entry = length | (length < rest ? SentObject::continues : 0);
      }
      std::memcpy(body + used, &entry, sizeof(entry));
      used += sizeof(entry);
      if (length != 0) {
        std::memcpy(body + used, object.data() + send.next_offset, length);
        used += length;
      }
      ++header.count;
      if ((entry & SentObject::continues) != 0 && !refused && !direct) {
        send.next_offset += length;
        break;
      }
      ++send.next_object;
      send.next_offset = 0;
    }
    header.type = MessageType::send_data;
    header.operation = send.remote_recv;
    header.tag = send.sent_as;
    header.body_bytes = static_cast<std::uint32_t>(used);
    header.flags = send.checks.on ? MessageHeader::checked : std::uint8_t{0};
    go_on_checking(send);
    if (send.next_object != objects.size()) {
      telling_.push_back(send.id);
    } else if (!send.checks.on || all_asked(send)) {
      header.flags |= MessageHeader::last;
      send.state = State::told;
    }  // else the last message follows its checksums
    end_message(list, header);
    return true;
  }
  return false;
}

bool RailProtocol::is_direct(const Transfer& send, std::size_t object) const {
  return send.post[object].direct != 0 && send.objects()[object].size() > terms_.eager_bytes;
}

bool RailProtocol::add_work(WorkList& list, std::size_t most_requests) {
  while (!moving_.empty()) {
    const auto it = transfers_.find(moving_.front());
    if (it == transfers_.end() || it->second.state != State::moving) {
      moving_.pop_front();
      continue;
    }
    Transfer& transfer = it->second;
    const std::size_t before = list.size();
    const std::size_t bytes = transfer.planner.plan(
        list, opcode_of(transfer.request().kind), terms_.request,
        std::min({turn_requests, terms_.queue_depth - posted_, most_requests - list.size()}), turn_bytes,
        *transfer.own_memory, transfer.borrowed ? &transfer.borrowed->slices() : nullptr);
    if (list.size() == before) {
      return false;
    }
    moving_.pop_front();
    ++transfer.outstanding;
    add_record(list, {.transfer = transfer.id,
                      .requests = list.size() - before,
                      .bytes = bytes,
                      .objects_end = transfer.planner.next_object()});
    if (transfer.planner.done()) {
      planned_all(transfer);
    } else {
      moving_.push_back(transfer.id);
    }
    if (transfer.request().kind == TransferKind::write) {
      go_on_checking(transfer);
    }
    return true;
  }
  return false;
}

/// All work requests of a transfer are in the list. The next message arrives behind the bytes that they move.
void RailProtocol::planned_all(Transfer& transfer) {
  transfer.state = State::told;
  if (transfer.request().kind == TransferKind::send) {
    transfer.state = State::telling;
    telling_.push_back(transfer.id);
  } else if (!transfer.request().notification.empty() && transfer.batch->parts() == 1 && !transfer.checks.on &&
             (transfer.request().kind == TransferKind::write || transfer.objects().empty())) {
    // A write's comes behind its bytes. A read's waits until they are here, and one with checksums until they have been
    // compared.
    transfer.notification_attached = true;
    notifications_.push_back(transfer.id);
  } else if (!transfer.request().notification.empty() && transfer.batch->parts() != 1 && !transfer.checks.on &&
             transfer.request().kind == TransferKind::write) {
    await_arrival(transfer);
  }
}

/// The notification of a batch on several rails goes over one of them. It must not overtake what the others have written.
/// That the peer's adapter has acknowledged bytes doesn't say that they are in memory; that the peer has taken a message
/// which came behind them on the same queue pair does. Any message will do that is answered. (A batch with checksums has
/// such messages.)
void RailProtocol::await_arrival(Transfer& write) {
  write.arrival_awaited = true;
  ask_regions([this, id = write.id] {
    const auto it = transfers_.find(id);
    if (it != transfers_.end()) {
      it->second.arrival_awaited = false;
      end_if_done(it->second);
    }
  });
}

void RailProtocol::completed() {
  bool ends_list = false;
  while (!ends_list && !records_.empty()) {
    const Record record = records_.front();
    records_.pop_front();
    ++completed_;
    ends_list = record.ends_list;
    posted_ -= record.requests;
    posted_bytes_ -= record.bytes;
    if (record.has_slot) {
      free_slots_.push_back(record.slot);
    }
    if (record.probe) {
      const auto answered = std::move(probes_.front());
      probes_.pop_front();
      answered();
    }
    const auto it = transfers_.find(record.transfer);
    if (it == transfers_.end()) {
      continue;
    }
    Transfer& transfer = it->second;
    --transfer.outstanding;
    if (transfer.request().one_sided() && record.objects_end > transfer.landed_end) {
      if (transfer.borrowed && transfer.request().kind == TransferKind::read) {
        transfer.borrowed->copy_back(transfer.landed_end, record.objects_end);
      }
      if (!transfer.checks.on) {
        transfer.operation().landed(transfer.landed_end, record.objects_end - transfer.landed_end);
      }
      transfer.landed_end = record.objects_end;
      if (transfer.request().kind == TransferKind::read) {
        go_on_checking(transfer);
      }
    }
    end_if_done(transfer);
  }
  answer_removals();
}

}  // namespace kvferry::rdma
