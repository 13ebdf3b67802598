// SPDX-License-Identifier: Apache-2.0

// The peer's checksums: they are compared with what lies in this side's memory, and the answer has a bit for each.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/detail/xxh3.hpp>
#include <kvferry/error.hpp>

#include "rail_checks.hpp"
#include "rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

template <class Entry>
std::vector<Entry> entries_of(std::span<const std::byte> body) {
  std::vector<Entry> entries(body.size() / sizeof(Entry));
  std::memcpy(entries.data(), body.data(), body.size());
  return entries;
}

/// Of a checksum that makes sense; else 0.
std::uint64_t bytes_in(const CheckedRange& range) {
  if (range.size == 0 || range.size > max_part_bytes || range.count == 0 || range.count > max_part_bytes / range.size ||
      range.count > max_part_blocks || (range.count > 1 && range.stride < range.size)) {
    return 0;
  }
  return range.size * range.count;
}

/// Whether a range that makes sense lies in a region, and the peer may compare it: that tells of its bytes, so it has to be
/// allowed to read them.
std::error_code check_range(const CheckedRange& range, bool written, const kit::RegionList& regions) {
  const LocalRegion* const region = regions.find(range.region);
  if (region == nullptr) {
    return regions.refusal(range.region);
  }
  if (!allows(region->peer_access, written ? Access::read_write : Access::read)) {
    return errc::access_denied;
  }
  if (region->dmabuf_fd >= 0) {
    return errc::not_supported;
  }
  const std::uint64_t distances = range.count - 1;
  const std::uint64_t size = region->size;
  if (range.size > size || (distances != 0 && range.stride > (size - range.size) / distances) ||
      range.offset > size - range.size - distances * range.stride) {
    return errc::range_out_of_bounds;
  }
  return {};
}

}  // namespace

std::error_code RailProtocol::end_check_memory(const MessageHeader& header, std::span<const std::byte> body) {
  if (header.count == 0 || header.count > max_checked_parts || body.size() != header.count * sizeof(CheckedRange) ||
      terms_.checks == 0 || asked_.size() == max_checks) {
    return violated(std::to_string(header.count) + " checksums in " + std::to_string(body.size()) + " bytes, while " +
                    std::to_string(asked_.size()) + " messages of them wait");
  }
  Asked asked;
  asked.id = header.operation;
  asked.written = (header.flags & MessageHeader::checked) != 0;
  asked.ranges = entries_of<CheckedRange>(body);
  std::uint64_t total = 0;
  for (const CheckedRange& range : asked.ranges) {
    const std::uint64_t bytes = bytes_in(range);
    total += bytes;
    if (bytes == 0 || total > max_checked_bytes) {
      return violated("checksum of " + std::to_string(range.count) + " blocks of " + std::to_string(range.size) +
                      " bytes, " + std::to_string(range.stride) + " bytes apart");
    }
  }
  asked_.push_back(std::move(asked));
  return {};
}

/// The parts are resolved as they come, for what comes behind them may end the recv.
std::error_code RailProtocol::end_check_recv(const MessageHeader& header, std::span<const std::byte> body) {
  if (header.count == 0 || header.count > max_checked_parts || body.size() != header.count * sizeof(CheckedPart) ||
      terms_.checks == 0 || asked_.size() == max_checks) {
    return violated(std::to_string(header.count) + " checksums in " + std::to_string(body.size()) + " bytes, while " +
                    std::to_string(asked_.size()) + " messages of them wait");
  }
  std::error_code ec;
  Transfer* const recv = find(header.tag, TransferKind::recv, ec);
  if (ec) {
    return ec;
  }
  Asked asked;
  asked.id = header.operation;
  asked.recv = header.tag;
  const auto sums = entries_of<CheckedPart>(body);
  if (recv == nullptr) {
    asked.parts.resize(sums.size());  // to be counted in the answer
    asked_.push_back(std::move(asked));
    return {};
  }
  if (!recv->checks.on || recv->checks.complete) {
    return violated("checksums for recv " + std::to_string(header.tag) + ", which has none, or no more");
  }
  std::uint64_t total = 0;
  for (const CheckedPart& sum : sums) {
    Cursor& at = recv->checks.next;
    skip_what_needs_none(*recv, at, recv->next_object);
    const std::uint64_t rest = at.object == recv->next_object ? 0 : recv->checks.came[at.object] - at.offset;
    total += sum.length;
    if (rest == 0 || sum.length != std::min(rest, max_part_bytes) || total > max_checked_bytes) {
      return violated("checksum of " + std::to_string(sum.length) + " bytes, of object " + std::to_string(at.object) +
                      " there are " + std::to_string(rest));
    }
    asked.parts.push_back({at.object, at.offset, sum.length, sum.sum});
    at.offset += sum.length;
  }
  skip_what_needs_none(*recv, recv->checks.next, recv->next_object);
  ++recv->checks.unanswered;
  asked_.push_back(std::move(asked));
  return {};
}

bool RailProtocol::answer_step() {
  if (asked_.empty() || control_.size() >= max_queued_answers) {
    return false;
  }
  Asked& asked = asked_.front();
  const std::size_t count = asked.recv != 0 ? asked.parts.size() : asked.ranges.size();
  Transfer* recv = nullptr;
  if (asked.recv != 0) {
    const auto it = transfers_.find(asked.recv);
    recv = it == transfers_.end() ? nullptr : &it->second;
  } else if (own_regions_ == nullptr || own_regions_->outdated()) {
    own_regions_ = host_->local_regions();
  }
  std::error_code status;
  if (asked.recv != 0 && recv == nullptr) {
    status = errc::peer_cancelled;
  }
  for (std::uint64_t taken = 0; !status && taken < step_bytes && asked.next < count; ++asked.next) {
    pieces_.clear();
    std::uint64_t sum = 0;
    if (recv != nullptr) {
      const Asked::Part& part = asked.parts[asked.next];
      std::byte* const data = recv->request().objects[part.object].data() + part.offset;
      pieces_.push_back({data, static_cast<std::size_t>(part.length)});
      sum = part.sum;
      taken += part.length;
    } else {
      const CheckedRange& range = asked.ranges[asked.next];
      status = check_range(range, asked.written, *own_regions_);
      if (status) {
        break;
      }
      std::byte* const data = own_regions_->find(range.region)->data + range.offset;
      for (std::uint64_t i = 0; i < range.count; ++i) {
        pieces_.push_back({data + i * range.stride, static_cast<std::size_t>(range.size)});
      }
      sum = range.sum;
      taken += range.size * range.count;
    }
    taken += pieces_.size() * bytes_of_a_piece;
    if (!look_->can_read(pieces_)) {
      status = errc::memory_fault;
    } else if (xxh3_of(pieces_) != sum) {
      asked.differing[asked.next / 64] |= std::uint64_t{1} << asked.next % 64;
      if (recv != nullptr) {
        note_differing(*recv, asked.parts[asked.next].object);
      }
      if (recv != nullptr || asked.written) {
        host_->checksums_differed(1);
      }
    }
  }
  if (!status && asked.next < count) {
    return true;
  }
  MessageHeader header;
  header.type = MessageType::check_answer;
  header.operation = asked.id;
  header.count = static_cast<std::uint32_t>(count);
  header.status = static_cast<std::uint32_t>(status.value());
  if (!status) {
    header.first = asked.differing[0];
    header.tag = asked.differing[1];
  }
  asked_.pop_front();
  tell(header);
  if (recv != nullptr) {
    --recv->checks.unanswered;
    if (status && !recv->checks.failure) {
      recv->checks.failure = status;
      recv->why = "the memory of its objects can't be read";
    }
    if (recv->checks.complete && recv->checks.unanswered == 0) {
      end_checked_recv(*recv);
    }
  }
  return true;
}

void RailProtocol::note_differing(Transfer& transfer, std::size_t object) {
  transfer.checks.differing.resize(transfer.request().objects.size());
  transfer.checks.differing[object] = true;
}

/// All of a recv has come, and been compared.
void RailProtocol::end_checked_recv(Transfer& recv) {
  MessageHeader ack;
  ack.type = MessageType::send_ack;
  ack.operation = recv.sent_as;
  tell(ack);
  const Checks& checks = recv.checks;
  for (std::size_t i = 0; !checks.failure && i < checks.came.size(); ++i) {
    if (checks.came[i] == nothing_came) {
      continue;
    }
    const auto size = static_cast<std::size_t>(checks.came[i]);
    if (checks.differing.empty() || !checks.differing[i]) {
      recv.operation().received(i, size);
      continue;
    }
    recv.operation().failed(i, errc::checksum_mismatch);
    recv.why = differs(i);
  }
  const auto cause =
      !checks.failure && !checks.differing.empty() ? std::error_code(errc::checksum_mismatch) : checks.failure;
  end(recv, cause, std::move(recv.why));
}

}  // namespace kvferry::rdma
