// SPDX-License-Identifier: Apache-2.0

// Checksums. The side that started a write, read or send takes the sums of its objects, a part of 1 MiB at a time, and tells them
// behind the bytes on the same queue pair; the peer compares them with what lies in its memory then, and answers with a bit
// for each. So of a write and a send the destination is compared with the source, of a read the source with the destination.
#include <algorithm>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/detail/xxh3.hpp>
#include <kvferry/error.hpp>

#include "rail_checks.hpp"
#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

template <class Entry>
void append(std::vector<std::byte>& body, const Entry& entry) {
  const auto bytes = std::as_bytes(std::span(&entry, 1));
  body.insert(body.end(), bytes.begin(), bytes.end());
}

/// An answer's status. Only what can be true of checksums is believed.
std::error_code check_status(std::uint32_t status) {
  switch (static_cast<errc>(status)) {
    case errc::region_gone:
    case errc::unknown_region:
    case errc::access_denied:
    case errc::range_out_of_bounds:
    case errc::memory_fault:
    case errc::not_supported:
    case errc::peer_cancelled: return static_cast<errc>(status);
    default: return status == 0 ? std::error_code() : std::error_code(errc::protocol_violation);
  }
}

}  // namespace

/// Of a transfer that is about to begin.
kit::Failure RailProtocol::begin_checks(Transfer& transfer, std::vector<bool> uncompared) {
  const TransferRequest& request = transfer.request();
  if (!request.checksums.value_or(false)) {
    return {};
  }
  if (terms_.checks == 0) {
    return {errc::not_supported, "the peer has no checksums over RDMA"};
  }
  if (!request.one_sided() || transfer.range.begin == transfer.range.end) {
    return {};
  }
  Checks& checks = transfer.checks;
  checks.on = true;
  checks.next.object = transfer.range.begin;
  checks.decided = transfer.range.begin;
  checks.uncompared = std::move(uncompared);
  return {};
}

/// Of a send that has met a recv.
void RailProtocol::begin_checks(Transfer& send, bool asked_for) {
  send.checks = {};
  send.checks.on = asked_for || send.request().checksums.value_or(false);
}

std::uint64_t RailProtocol::bytes_of(const Transfer& transfer, std::size_t object) {
  return transfer.request().kind == TransferKind::recv ? transfer.checks.came[object]
                                                       : kit::LocalBytes(transfer.request()).size(object);
}

bool RailProtocol::needs_sum(const Transfer& transfer, std::size_t object) {
  const auto& uncompared = transfer.checks.uncompared;
  const bool refused = transfer.request().kind == TransferKind::recv
                           ? transfer.checks.came[object] == nothing_came
                           : !transfer.refused.empty() && transfer.refused[object];
  return !refused && (uncompared.empty() || !uncompared[object]) && bytes_of(transfer, object) != 0;
}

/// Moves a cursor to where the next part begins, or to the end.
void RailProtocol::skip_what_needs_none(Transfer& transfer, Cursor& cursor, std::size_t end) {
  while (cursor.object < end &&
         (!needs_sum(transfer, cursor.object) || cursor.offset == bytes_of(transfer, cursor.object))) {
    ++cursor.object;
    cursor.offset = 0;
  }
}

/// Objects before it are on their way to the peer, ahead of what is said next; those of a read are here.
std::size_t RailProtocol::checkable(const Transfer& transfer) {
  switch (transfer.request().kind) {
    case TransferKind::write: return transfer.planner.next_object();
    case TransferKind::read: return transfer.landed_end;
    default: return transfer.next_object;
  }
}

bool RailProtocol::all_asked(const Transfer& transfer) noexcept {
  return transfer.checks.next.object == transfer.range.end && transfer.checks.parts == 0;
}

bool RailProtocol::all_checked(const Transfer& transfer) noexcept {
  return !transfer.checks.on ||
         (!transfer.checks.failure && all_asked(transfer) && transfer.checks.unanswered == 0);
}

/// There is more whose sums can be taken.
void RailProtocol::go_on_checking(Transfer& transfer) {
  Checks& checks = transfer.checks;
  if (!checks.on || checks.queued || checks.ready || transfer.state == State::stopping) {
    return;
  }
  skip_what_needs_none(transfer, checks.next, checkable(transfer));
  if (checks.next.object < checkable(transfer) || (checks.next.object == transfer.range.end && checks.parts != 0)) {
    checks.queued = true;
    checking_.push_back(transfer.id);
  }
}

std::size_t RailProtocol::parts_in_message(const Transfer& transfer) const noexcept {
  const std::size_t of_a_part = transfer.request().one_sided() ? sizeof(CheckedRange) : sizeof(CheckedPart);
  return std::min(max_checked_parts, (slot_bytes_ - sizeof(MessageHeader)) / of_a_part);
}

/// Takes the sum of the next part. @return how many bytes it has; 0 if they can't be read.
std::uint64_t RailProtocol::add_sum(Transfer& transfer) {
  const TransferRequest& request = transfer.request();
  Checks& checks = transfer.checks;
  const std::size_t object = checks.next.object;
  ObjectPart part;
  if (!request.one_sided()) {
    part.length = std::min(max_part_bytes, bytes_of(transfer, object) - checks.next.offset);
  } else if (!request.remote_ranges.empty()) {
    part = part_of(request.remote_ranges[object], checks.next.offset);
  } else {
    const std::uint64_t page_size = transfer.remote->find(request.remote_region)->page_size;
    part = part_of(RemoteRange::contiguous(request.remote_region, request.remote_indexes[object] * page_size,
                                           bytes_of(transfer, object)),
                   checks.next.offset);
  }
  pieces_.clear();
  kit::LocalBytes(request).for_each_piece(object, static_cast<std::size_t>(checks.next.offset),
                                          static_cast<std::size_t>(part.length),
                                          [&](std::byte* data, std::size_t length) {
                                            pieces_.push_back({data, length});
                                          });
  if (!look_->can_read(pieces_)) {
    return 0;
  }
  const std::uint64_t sum = xxh3_of(pieces_);
  if (checks.parts == 0) {
    checks.begin = checks.next;
  }
  if (request.one_sided()) {
    append(checks.question, CheckedRange{part.remote.offset, part.remote.size, part.remote.stride, part.remote.region,
                                         static_cast<std::uint32_t>(part.remote.count), sum});
  } else {
    append(checks.question, CheckedPart{part.length, sum});
  }
  ++checks.parts;
  checks.bytes += part.length;
  checks.next.offset += part.length;
  return part.length;
}

bool RailProtocol::check_step() {
  const bool answered = answer_step();
  const bool asked = ask_step();
  return answered || asked;
}

bool RailProtocol::ask_step() {
  while (!checking_.empty()) {
    const auto it = transfers_.find(checking_.front());
    checking_.pop_front();
    if (it == transfers_.end()) {
      continue;
    }
    Transfer& transfer = it->second;
    Checks& checks = transfer.checks;
    checks.queued = false;
    if (!checks.on || checks.ready || transfer.state == State::stopping) {
      continue;
    }
    const std::size_t end = checkable(transfer);
    const auto full = [&] {
      return checks.parts == parts_in_message(transfer) || checks.bytes + max_part_bytes > max_checked_bytes;
    };
    skip_what_needs_none(transfer, checks.next, end);
    for (std::uint64_t taken = 0; taken < step_bytes && checks.next.object < end && !full();) {
      const std::uint64_t bytes = add_sum(transfer);
      if (bytes == 0) {
        if (transfer.request().kind == TransferKind::send) {
          abort_send(transfer);
        }
        end_when_drained(transfer, errc::memory_fault,
                         "object " + std::to_string(checks.next.object) + " lies in memory that can't be read");
        return true;
      }
      taken += bytes + pieces_.size() * bytes_of_a_piece;
      skip_what_needs_none(transfer, checks.next, end);
    }
    if (full() || (checks.next.object == transfer.range.end && checks.parts != 0)) {
      checks.ready = true;
      questions_ready_.push_back(transfer.id);
    } else {
      go_on_checking(transfer);
    }
    return true;
  }
  return false;
}

bool RailProtocol::add_question(WorkList& list) {
  while (!questions_ready_.empty() && questions_asked_.size() < terms_.checks) {
    const auto it = transfers_.find(questions_ready_.front());
    questions_ready_.pop_front();
    if (it == transfers_.end() || !it->second.checks.ready || it->second.state == State::stopping) {
      continue;
    }
    Transfer& transfer = it->second;
    Checks& checks = transfer.checks;
    const bool one_sided = transfer.request().one_sided();
    std::memcpy(begin_message(), checks.question.data(), checks.question.size());
    MessageHeader header;
    header.type = one_sided ? MessageType::check_memory : MessageType::check_recv;
    header.flags = transfer.request().kind == TransferKind::write ? MessageHeader::checked : std::uint8_t{0};
    header.operation = next_id_++;
    header.tag = one_sided ? 0 : transfer.remote_recv;
    header.count = static_cast<std::uint32_t>(checks.parts);
    header.body_bytes = static_cast<std::uint32_t>(checks.question.size());
    questions_asked_.push_back(
        {header.operation, transfer.id, transfer.sent_as, checks.begin, checks.parts, checks.next.object});
    ++checks.unanswered;
    checks.ready = false;
    checks.question.clear();
    checks.parts = 0;
    checks.bytes = 0;
    end_message(list, header);
    go_on_checking(transfer);
    if (!one_sided && all_asked(transfer)) {
      telling_.push_back(transfer.id);  // that this was all
    }
    return true;
  }
  return false;
}

/// Objects before `end` have been compared.
void RailProtocol::decide(Transfer& transfer, std::size_t end) {
  Checks& checks = transfer.checks;
  for (; checks.decided < end; ++checks.decided) {
    if (checks.differing.empty() || !checks.differing[checks.decided]) {
      transfer.operation().landed(checks.decided, 1);
      continue;
    }
    transfer.operation().failed(checks.decided, errc::checksum_mismatch);
    if (!transfer.failure) {
      transfer.failure = errc::checksum_mismatch;
      transfer.why = differs(checks.decided);
    }
  }
}

/// All of a send has been taken by the peer.
void RailProtocol::decide_send(Transfer& send) {
  const auto& differing = send.checks.differing;
  send.failure = send.checks.failure;
  for (std::size_t i = 0; !send.failure && i < send.request().objects.size(); ++i) {
    if (!send.refused.empty() && send.refused[i]) {
      continue;
    }
    if (differing.empty() || !differing[i]) {
      send.operation().landed(i, 1);
    } else {
      send.operation().failed(i, errc::checksum_mismatch);
      send.why = differs(i);
    }
  }
  if (!send.failure && !differing.empty()) {
    send.failure = errc::checksum_mismatch;
  }
}

std::error_code RailProtocol::end_check_answer(const MessageHeader& header) {
  if (questions_asked_.empty() || questions_asked_.front().id != header.operation ||
      questions_asked_.front().parts != header.count) {
    return violated("answer to " + std::to_string(header.count) + " checksums of message " +
                    std::to_string(header.operation) + ", which is not the next");
  }
  const auto status = check_status(header.status);
  if (status == errc::protocol_violation) {
    return violated("answer to checksums with status " + std::to_string(header.status));
  }
  const Question question = questions_asked_.front();
  questions_asked_.pop_front();
  const auto it = transfers_.find(question.transfer);
  if (it == transfers_.end() || it->second.sent_as != question.attempt || !it->second.checks.on) {
    return {};
  }
  Transfer& transfer = it->second;
  const bool one_sided = transfer.request().one_sided();
  --transfer.checks.unanswered;
  if (status) {
    if (status == errc::peer_cancelled) {
      // Of a recv that is gone, the answer to the send's end says so as well.
      return one_sided ? violated("a write's or read's checksums answered as of a recv that is gone") : std::error_code();
    }
    // Kept also by what is stopping: nobody has compared these objects, whatever is said of later ones.
    const bool first = !transfer.checks.failure;
    transfer.checks.failure = first ? status : transfer.checks.failure;
    std::string why = "the peer couldn't compare its checksums: " + status.message();
    if (one_sided && transfer.state != State::stopping) {
      end_when_drained(transfer, status, std::move(why));
    } else if (!one_sided && first && transfer.state != State::stopping) {
      transfer.why = std::move(why);
    }
    return {};
  }
  Cursor at = question.begin;
  for (std::size_t i = 0; i < question.parts; ++i) {
    skip_what_needs_none(transfer, at, transfer.range.end);
    if ((i < 64 ? header.first >> i & 1 : header.tag >> (i - 64) & 1) != 0) {
      note_differing(transfer, at.object);
      if (transfer.request().kind == TransferKind::read) {
        host_->checksums_differed(1);
      }
    }
    const std::uint64_t rest = bytes_of(transfer, at.object) - at.offset;
    at.offset += one_sided && !transfer.request().remote_ranges.empty()
                     ? part_of(transfer.request().remote_ranges[at.object], at.offset).length
                     : std::min(rest, max_part_bytes);
  }
  if (one_sided) {
    if (!transfer.checks.failure) {
      decide(transfer, question.end);
    }
    end_if_done(transfer);
  }
  return {};
}

}  // namespace kvferry::rdma
