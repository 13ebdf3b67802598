// SPDX-License-Identifier: Apache-2.0
#pragma once

//
// Checksums of a lane's payload: taken when a frame is about to leave, compared when all of it has come.
#include <kvferry/error.hpp>

#include <kvferry/tcp/lane_protocol.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Memory that isn't there has sums of nothing: the kernel finds that out, too, when it is to send it, and the trailer says so.
KVFERRY_INLINE void LaneProtocol::add_checksums(std::span<const iovec> memory, std::span<Checksum> checksums) {
  if (checksums.empty()) {
    return;
  }
  if (reader_.can_read(memory)) {
    take_checksums(memory, checksums);
  }
  out_.add_copy(std::as_bytes(checksums));
}

KVFERRY_INLINE std::error_code LaneProtocol::check_checksums(const Frame& frame) {
  std::uint64_t total = 0;
  for (const Checksum& checksum : frame.checksums) {
    if (checksum.length > max_chunk_bytes) {
      return violated("checksum of " + std::to_string(checksum.length) + " bytes");
    }
    total += checksum.length;
  }
  // A frame that was filled up has nothing where its checksums were.
  if (total != frame.header.payload_bytes && frame.trailer.status == 0) {
    return violated("checksums of " + std::to_string(total) + " bytes in all, payload of " +
                    std::to_string(frame.header.payload_bytes));
  }
  return {};
}

KVFERRY_INLINE std::error_code LaneProtocol::landed(const Frame& frame) {
  const std::error_code fault = fault_of(frame);
  differing_.clear();
  if (fault || frame.header.checksums == 0) {
    return fault;
  }
  if (!reader_.can_read(landing_)) {
    return errc::memory_fault;
  }
  differing_ = differing_checksums(landing_, frame.checksums);
  if (!differing_.empty()) {
    host_->checksums_differed(differing_.size());
  }
  return differing_.empty() ? std::error_code() : errc::checksum_mismatch;
}

KVFERRY_INLINE std::vector<Descriptor> LaneProtocol::differing_objects(const Frame& frame) const {
  if (differing_.empty()) {
    return {};
  }
  ObjectSet objects;
  for (const std::size_t number : differing_) {
    objects.add(number);
  }
  return objects.descriptors(frame.checksums.size());
}

KVFERRY_INLINE ObjectSet LaneProtocol::differing_objects(const Frame& frame, const Transfer& read,
                                                         const Chunk& chunk) const {
  CoveredBytes differing(frame.checksums, differing_);
  ObjectSet objects;
  std::size_t number = 0;
  read.cursor.for_each_piece(chunk, [&](const Piece& piece) {
    if (differing.in_next(piece.length)) {
      objects.add(number);
    }
    ++number;
  });
  return objects;
}

}  // namespace kvferry::tcp
