// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// The effects that a peer's bytes may have on this side's memory, worked out from docs/wire_protocol.md alone, without the
/// library's reader: which bytes of a region that peers may write to may have changed, and to what, and whose operations got
/// data.
///
/// It allows more than the protocol does - what comes behind a violation counts as well, and a frame may have been read past -
/// but no byte that no frame names.
class LaneModel {
 public:
  /// @param writable the numbers of the regions that peers may write to; all have `pages` pages of `page_bytes` bytes.
  /// @param referable the peer's memory, whose first byte has the address 0, where this side fetches from it; none: it doesn't.
  LaneModel(std::set<std::uint32_t> writable, std::size_t pages, std::size_t page_bytes,
            std::span<const std::byte> referable = {})
      : writable_(std::move(writable)), pages_(pages), page_size_(page_bytes), referable_(referable) {}

  void read(std::span<const std::byte> bytes) {
    while (bytes.size() >= sizeof(FrameHeader)) {
      FrameHeader header;
      std::memcpy(&header, bytes.data(), sizeof(header));
      bytes = bytes.subspan(sizeof(header));
      if (header.count > max_chunk_objects && header.type != FrameType::recv_post) {
        return;
      }
      if (bytes.size() / sizeof(Descriptor) < header.count) {
        return;
      }
      std::vector<Descriptor> descriptors(header.count);
      if (!descriptors.empty()) {
        std::memcpy(descriptors.data(), bytes.data(), descriptors.size() * sizeof(Descriptor));
      }
      bytes = bytes.subspan(descriptors.size() * sizeof(Descriptor));
      std::uint64_t follows = header.type == FrameType::read ? 0 : header.payload_bytes;
      std::vector<std::byte> fetched;
      auto payload = bytes.first(static_cast<std::size_t>(std::min<std::uint64_t>(follows, bytes.size())));
      if (header.references != 0) {
        const std::size_t of_references = header.references * sizeof(Reference);
        if (referable_.empty() || header.references > max_references || bytes.size() < of_references) {
          return;
        }
        fetched = fetch(bytes.first(of_references));
        payload = fetched;
        follows = of_references;
      }
      take(header, descriptors, payload);
      if (header.checksums > (has_trailer(header) ? max_chunk_objects : 0)) {
        return;
      }
      const std::uint64_t skipped = follows + header.notification_bytes + header.checksums * sizeof(Checksum) +
                                    (has_trailer(header) ? sizeof(FrameTrailer) : 0);
      if (skipped < follows || skipped > bytes.size()) {
        return;
      }
      bytes = bytes.subspan(static_cast<std::size_t>(skipped));
    }
  }

  /// Whether byte `offset` of a region may be `now`, having been `before`.
  [[nodiscard]] bool may_be(std::uint32_t region, std::size_t offset, std::byte now, std::byte before) const {
    return now == before || changes_.contains({region, offset, now});
  }
  /// Whether any byte of a region may have changed.
  [[nodiscard]] bool changes_anything() const { return !changes_.empty(); }
  /// Whether there was a frame of a type.
  [[nodiscard]] bool has(FrameType type) const { return good_ones_.contains(type); }
  /// Frames of a type that say that all is well.
  [[nodiscard]] std::size_t good_ones(FrameType type) const {
    const auto it = good_ones_.find(type);
    return it == good_ones_.end() ? 0 : it->second;
  }
  /// Whether a read or recv with this id may have got bytes.
  [[nodiscard]] bool may_have_received(std::uint64_t operation) const { return received_.contains(operation); }

 private:
  struct Change {
    std::uint32_t region;
    std::size_t offset;
    std::byte value;
    auto operator<=>(const Change&) const = default;
  };

  /// The bytes that references name, up to the first one that names more than there is.
  [[nodiscard]] std::vector<std::byte> fetch(std::span<const std::byte> bytes) const {
    std::vector<std::byte> fetched;
    for (; !bytes.empty(); bytes = bytes.subspan(sizeof(Reference))) {
      Reference reference;
      std::memcpy(&reference, bytes.data(), sizeof(reference));
      if (reference.address > referable_.size()) {
        break;
      }
      const auto there = referable_.subspan(static_cast<std::size_t>(reference.address));
      const auto part = there.first(static_cast<std::size_t>(std::min<std::uint64_t>(reference.length, there.size())));
      fetched.insert(fetched.end(), part.begin(), part.end());
      if (part.size() != reference.length) {
        break;
      }
    }
    return fetched;
  }

  void take(const FrameHeader& header, std::span<const Descriptor> descriptors, std::span<const std::byte> payload) {
    good_ones_[header.type] += header.status == 0 ? 1U : 0U;
    if (header.type == FrameType::read_data || header.type == FrameType::send_data) {
      received_.insert(header.operation);
    }
    if (header.type == FrameType::write && (header.flags & FrameHeader::ranges) != 0) {
      take_ranges(descriptors, payload);
      return;
    }
    if (header.type != FrameType::write || !writable_.contains(header.region)) {
      return;
    }
    std::uint64_t first = header.first_offset;
    for (const Descriptor& descriptor : descriptors) {
      if (descriptor.index >= pages_ || first > page_size_ || descriptor.length > page_size_ - first) {
        return;  // refused as a whole; what has been noted of it allows too much
      }
      for (std::uint64_t i = 0; i < descriptor.length && !payload.empty(); ++i) {
        changes_.insert(
            {header.region, static_cast<std::size_t>(descriptor.index * page_size_ + first + i), payload[0]});
        payload = payload.subspan(1);
      }
      first = 0;
    }
  }

  /// Byte by byte; what a frame means that is refused as a whole counts up to where it is wrong.
  void take_ranges(std::span<const Descriptor> descriptors, std::span<const std::byte> payload) {
    for (std::size_t i = 0; i < descriptors.size(); ++i) {
      const auto range = std::bit_cast<RangeDescriptor>(descriptors[i]);
      const std::uint32_t region = range.region & ~RangeDescriptor::blocks;
      BlockDescriptor block{range.length, range.length, 0};
      if ((range.region & RangeDescriptor::blocks) != 0) {
        if (++i == descriptors.size()) {
          return;
        }
        block = std::bit_cast<BlockDescriptor>(descriptors[i]);
        if (block.size == 0) {
          return;
        }
      }
      if (!writable_.contains(region)) {
        return;
      }
      for (std::uint64_t byte = block.skip; byte - block.skip < range.length && !payload.empty(); ++byte) {
        const std::uint64_t block_number = byte / block.size;
        const std::uint64_t end = pages_ * page_size_;
        if (range.offset >= end || (block_number != 0 && block.stride >= end / block_number)) {
          return;
        }
        const std::uint64_t position = range.offset + block_number * block.stride + byte % block.size;
        if (position >= end) {
          return;
        }
        changes_.insert({region, static_cast<std::size_t>(position), payload[0]});
        payload = payload.subspan(1);
      }
    }
  }

  const std::set<std::uint32_t> writable_;
  const std::size_t pages_;
  const std::size_t page_size_;
  const std::span<const std::byte> referable_;
  std::set<Change> changes_;
  std::set<std::uint64_t> received_;
  std::map<FrameType, std::size_t> good_ones_;
};

}  // namespace kvferry::tcp::testing
