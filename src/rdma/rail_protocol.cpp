// SPDX-License-Identifier: Apache-2.0
#include "rail_protocol.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::rdma {
namespace {

/// Bytes with the adapter at a time: enough for any network to be full, few enough to be gone soon when an operation is
/// stopped.
constexpr std::size_t window_bytes = std::size_t{8} << 20;
/// What an operation may post before it is another one's turn.
constexpr std::size_t turn_bytes = std::size_t{1} << 20;
constexpr std::size_t turn_requests = 32;
/// Places in the queue besides those for operations: for a probe, a goodbye.
constexpr std::size_t reserved_requests = 2;

ibv_wr_opcode opcode_of(TransferKind kind) { return kind == TransferKind::read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE; }

}  // namespace

RailProtocol::RailProtocol(std::shared_ptr<kit::LinkHost> host, const SliceTable& own_memory, MessageSlots slots,
                           RailTerms terms)
    : host_(std::move(host)),
      own_memory_(own_memory),
      slots_(slots),
      terms_(std::move(terms)),
      credits_(terms_.peer_buffers) {
  for (std::size_t i = 0; i < slots_.count; ++i) {
    free_slots_.push_back(i);
  }
}

void RailProtocol::start(std::shared_ptr<kit::StripedOperation> batch, kit::ObjectRange range,
                         Preparation preparation) {
  const auto& operation = batch->operation();
  const TransferRequest& request = operation->request();
  std::error_code refused = failed_ ? failed_ : operation->stop_cause();
  std::string why = failed_ ? failed_why_ : std::string();
  if (!refused && !request.one_sided() && request.objects.size() > kit::max_paired_objects) {
    refused = errc::resource_limit;
    why = std::to_string(request.objects.size()) + " objects, at most " + std::to_string(kit::max_paired_objects) +
          " go in one " + std::string(to_string(request.kind));
  }
  if (refused) {
    if (preparation.offered) {
      preparation.offered->close();
    }
    (void)batch->part_done(refused, std::move(why));
    return;
  }

  const std::uint64_t id = next_id_++;
  ids_.emplace(operation.get(), id);
  Transfer& transfer = transfers_[id];
  transfer.id = id;
  transfer.batch = std::move(batch);
  transfer.range = range;
  transfer.landed_end = range.begin;
  transfer.borrowed = std::move(preparation.borrowed);
  transfer.offered = std::move(preparation.offered);
  switch (request.kind) {
    case TransferKind::write:
    case TransferKind::read: {
      const RemoteRegion& region = host_->peer().regions[request.remote_region];
      transfer.planner = WorkPlanner(transfer.objects(), range,
                                     RemoteMemory(terms_.remote_regions[request.remote_region], region.page_size,
                                                  request.remote_indexes));
      if (transfer.planner.done()) {
        planned_all(transfer);
        transfer.operation().landed(range.begin, range.end - range.begin);
        end_if_done(transfer);
      } else {
        moving_.push_back(id);
      }
      break;
    }
    case TransferKind::send:
      transfer.state = State::matching;
      matcher_.add_send(request.tag, id, id);
      match(request.tag);
      break;
    case TransferKind::recv:
      transfer.state = State::told;
      recv_posts_.push_back(id);
      break;
  }
}

void RailProtocol::stop(const kit::Operation& operation) {
  const auto it = ids_.find(&operation);
  if (it == ids_.end()) {
    return;
  }
  Transfer& transfer = transfers_.at(it->second);
  if (transfer.state == State::stopping) {
    return;
  }
  const auto cause = operation.stop_cause();
  if (transfer.request().kind == TransferKind::send && transfer.remote_recv != 0) {
    // Goes out behind the writes into the recv's buffers that are under way.
    tell_recv_aborted(transfer.remote_recv, errc::peer_cancelled);
  }
  if (transfer.request().kind != TransferKind::recv) {
    end_when_drained(transfer, cause);
    return;
  }
  if (transfer.recv_posted) {
    MessageHeader cancel;
    cancel.type = MessageType::recv_cancel;
    cancel.operation = transfer.id;
    cancel.tag = transfer.request().tag;
    tell(cancel);
  }
  if (!transfer.recv_posted || !transfer.offered->any_direct()) {
    end(transfer, cause, {});
    return;
  }
  // The sender may be writing into the buffers: until it says that it won't any more, or is kept out.
  transfer.failure = cause;
  transfer.state = State::stopping;
  transfer.stopped = kit::Clock::now();
  ++draining_;
}

std::optional<kit::Clock::time_point> RailProtocol::draining_since() const {
  std::optional<kit::Clock::time_point> since;
  if (draining_ != 0) {
    for (const auto& [id, transfer] : transfers_) {
      if (transfer.state == State::stopping && (!since || transfer.stopped < *since)) {
        since = transfer.stopped;
      }
    }
  }
  return since;
}

bool RailProtocol::cut_off(kit::Clock::time_point until) {
  std::vector<std::uint64_t> closable;
  bool others = false;
  for (const auto& [id, transfer] : transfers_) {
    if (transfer.state == State::stopping && transfer.stopped <= until) {
      const bool is_recv = transfer.request().kind == TransferKind::recv;
      if (is_recv && transfer.offered->revocable()) {
        closable.push_back(id);
      } else {
        others = true;
      }
    }
  }
  for (const std::uint64_t id : closable) {
    Transfer& transfer = transfers_.at(id);
    end(transfer, transfer.failure, {});
  }
  return others;
}

void RailProtocol::fail(std::error_code cause, const std::string& why, std::uint64_t culprit) {
  if (failed_) {
    return;
  }
  // What one operation did to the connection says nothing about the others, which may simply be tried again.
  const bool concerns_all = culprit == 0 || cause == condition::retryable;
  failed_ = concerns_all ? cause : std::error_code(errc::connection_lost);
  failed_why_ = why;
  control_.clear();
  matcher_.clear_posts();
  records_.clear();
  while (!transfers_.empty()) {
    Transfer& transfer = transfers_.begin()->second;
    transfer.outstanding = 0;
    if (transfer.state == State::stopping) {
      end(transfer, transfer.failure, transfer.why);
    } else {
      end(transfer, transfer.id == culprit ? cause : failed_, why);
    }
  }
}

bool RailProtocol::fill(WorkList& list) {
  list.clear();
  while (list.has_request() && list.has_piece() && posted_ < terms_.queue_depth) {
    if (!add_message(list) && (posted_bytes_ >= window_bytes || !add_work(list))) {
      break;
    }
  }
  if (list.empty() && owed_ >= terms_.own_buffers / 2) {
    return fill_message(list, MessageType::credit, 0, 0);
  }
  if (list.empty()) {
    return false;
  }
  records_.back().ends_list = true;
  return true;
}

bool RailProtocol::fill_probe(WorkList& list) {
  list.clear();
  if (posted_ >= terms_.queue_depth + reserved_requests) {
    return false;
  }
  list.add_request(IBV_WR_RDMA_WRITE).wr_id = 0;
  add_record(list, {.requests = 1});
  records_.back().ends_list = true;
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

void RailProtocol::add_record(WorkList& list, Record record) {
  posted_ += record.requests;
  posted_bytes_ += record.bytes;
  for (std::size_t i = list.size() - record.requests; i < list.size(); ++i) {
    list[i].wr_id = record.transfer;
  }
  records_.push_back(record);
}

std::byte* RailProtocol::begin_message() {
  return credits_ < 2 || free_slots_.empty() ? nullptr
                                             : slots_.memory + free_slots_.back() * slots_.bytes + sizeof(MessageHeader);
}

void RailProtocol::end_message(WorkList& list, MessageHeader header) {
  const std::size_t slot = free_slots_.back();
  free_slots_.pop_back();
  --credits_;
  header.credits = static_cast<std::uint16_t>(std::min<std::size_t>(owed_, 0xffff));
  owed_ -= header.credits;
  std::byte* const memory = slots_.memory + slot * slots_.bytes;
  std::memcpy(memory, &header, sizeof(header));
  const std::size_t size = sizeof(header) + header.body_bytes;
  ibv_send_wr& request = list.add_request(IBV_WR_SEND);
  list.add_piece(address_of(memory), size, slots_.key);
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
  return add_recv_post(list) || add_notification(list) || add_send_data(list);
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
    const std::size_t fit = (slots_.bytes - sizeof(MessageHeader)) / sizeof(PostedBuffer);
    const std::size_t count = std::min(fit, posted.size() - recv.said);
    std::memcpy(begin_message(), posted.data() + recv.said, count * sizeof(PostedBuffer));
    MessageHeader header;
    header.type = MessageType::recv_post;
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
    if (it == transfers_.end() || it->second.state == State::stopping) {
      notifications_.pop_front();
      continue;
    }
    Transfer& write = it->second;
    const auto& payload = write.request().notification;
    const std::size_t size = std::min(slots_.bytes - sizeof(MessageHeader), payload.size() - write.said);
    std::memcpy(begin_message(), payload.data() + write.said, size);
    MessageHeader header;
    header.type = MessageType::notify;
    header.operation = write.id;
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
    const std::size_t space = slots_.bytes - sizeof(MessageHeader);
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
    if (send.next_object == objects.size()) {
      header.flags |= MessageHeader::last;
      send.state = State::told;
    } else {
      telling_.push_back(send.id);
    }
    end_message(list, header);
    return true;
  }
  return false;
}

bool RailProtocol::is_direct(const Transfer& send, std::size_t object) const {
  return send.post[object].direct != 0 && send.objects()[object].size() > terms_.eager_bytes;
}

bool RailProtocol::add_work(WorkList& list) {
  while (!moving_.empty()) {
    const auto it = transfers_.find(moving_.front());
    if (it == transfers_.end() || it->second.state != State::moving) {
      moving_.pop_front();
      continue;
    }
    Transfer& transfer = it->second;
    const std::size_t before = list.size();
    const std::size_t bytes =
        transfer.planner.plan(list, opcode_of(transfer.request().kind), terms_.request,
                              std::min(turn_requests, terms_.queue_depth - posted_), turn_bytes, own_memory_,
                              transfer.borrowed ? &transfer.borrowed->slices() : nullptr);
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
    return true;
  }
  return false;
}

/// All work requests of a transfer are in the list. What is said next arrives behind what they move.
void RailProtocol::planned_all(Transfer& transfer) {
  transfer.state = State::told;
  if (transfer.request().kind == TransferKind::send) {
    transfer.state = State::telling;
    telling_.push_back(transfer.id);
  } else if (!transfer.request().notification.empty() && transfer.batch->parts() == 1) {
    transfer.notification_attached = true;
    notifications_.push_back(transfer.id);
  }
}

void RailProtocol::completed() {
  bool ends_list = false;
  while (!ends_list && !records_.empty()) {
    const Record record = records_.front();
    records_.pop_front();
    ends_list = record.ends_list;
    posted_ -= record.requests;
    posted_bytes_ -= record.bytes;
    if (record.has_slot) {
      free_slots_.push_back(record.slot);
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
      transfer.operation().landed(transfer.landed_end, record.objects_end - transfer.landed_end);
      transfer.landed_end = record.objects_end;
    }
    end_if_done(transfer);
  }
}

void RailProtocol::end_if_done(Transfer& transfer) {
  if (transfer.outstanding != 0) {
    return;
  }
  if (transfer.state == State::stopping) {
    end(transfer, transfer.failure, std::move(transfer.why));
    return;
  }
  const bool is_send = transfer.request().kind == TransferKind::send;
  const bool waits = is_send ? !transfer.acknowledged : transfer.notification_attached && !transfer.notification_done;
  if (transfer.state == State::told && !waits) {
    end(transfer, transfer.failure, std::move(transfer.why));
  }
}

void RailProtocol::end_when_drained(Transfer& transfer, std::error_code cause, std::string why) {
  if (transfer.outstanding == 0) {
    end(transfer, cause, std::move(why));
    return;
  }
  transfer.failure = cause;
  transfer.why = std::move(why);
  transfer.state = State::stopping;
  transfer.stopped = kit::Clock::now();
  ++draining_;
  forget_meeting(transfer);
}

void RailProtocol::end(Transfer& transfer, std::error_code cause, std::string why) {
  const auto batch = transfer.batch;
  if (transfer.offered) {
    transfer.offered->close();
  }
  if (transfer.state == State::notifying) {
    forget(transfer);
    batch->operation()->finish(cause, std::move(why));
    return;
  }
  if (!batch->part_done(cause, why)) {
    forget(transfer);
    return;
  }
  if (!batch->operation()->request().notification.empty() && !transfer.notification_attached) {
    transfer.state = State::notifying;
    notifications_.push_back(transfer.id);
    return;
  }
  forget(transfer);
  batch->operation()->finish({}, std::move(why));
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

void RailProtocol::forget(Transfer& transfer) {
  if (transfer.state == State::stopping) {
    --draining_;
  }
  forget_meeting(transfer);
  ids_.erase(&transfer.operation());
  // An id that is still in a queue is skipped there.
  transfers_.erase(transfer.id);
}

void RailProtocol::tell_recv_aborted(std::uint64_t recv, std::error_code cause, std::size_t count) {
  MessageHeader header;
  header.type = MessageType::send_abort;
  header.operation = recv;
  header.status = static_cast<std::uint32_t>(cause.value());
  header.count = static_cast<std::uint32_t>(count);
  tell(header);
}

void RailProtocol::match(std::uint64_t tag) {
  while (auto match = matcher_.match(tag)) {
    meet(transfers_.at(match->send), match->recv, std::move(match->post));
  }
}

void RailProtocol::meet(Transfer& send, std::uint64_t recv, std::vector<PostedBuffer> post) {
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
  send.post = std::move(post);
  send.refused.clear();
  send.why.clear();
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
  send.planner = WorkPlanner(objects, send.range, RemoteMemory(send.post), std::move(not_direct));
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
  send.operation().start_over();
  send.state = State::matching;
  matcher_.add_send(send.request().tag, send.id, send.id);
  match(send.request().tag);
}

}  // namespace kvferry::rdma
