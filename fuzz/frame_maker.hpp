// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <kvferry/tcp/checksums.hpp>
#include <kvferry/tcp/frame.hpp>
#include "fuzz/frame_types.hpp"
#include "fuzz/input.hpp"

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// The objects that the frames of a `FrameMaker` name.
struct FrameMakerShape {
  std::size_t pages = 0;
  std::size_t page_size = 0;
  std::uint32_t spared_region = ~std::uint32_t{0};  ///< Of the numbers below 8, one that no frame of pages names.
  std::uint64_t referable = 0;                      ///< Below this, addresses of references are right.
};

/// Frames of every type, with every flag, as an input chooses: right ones, nearly right ones, and senseless ones.
class FrameMaker {
 public:
  FrameMaker(Input& input, const FrameMakerShape& shape) : input_(input), shape_(shape) {}

  /// An id that the other side has given to something.
  void heard(std::uint64_t operation) { heard_.push_back(operation); }

  [[nodiscard]] tcp::FrameHeader header() {
    tcp::FrameHeader header;
    header.type = tcp::testing::frame_types[input_.choice(tcp::testing::frame_types.size())];
    fill(header);
    return header;
  }

  /// The whole frame, whose header then says what follows it.
  [[nodiscard]] std::vector<std::byte> with_body(tcp::FrameHeader& header) {
    std::vector<tcp::Descriptor> descriptors(input_.choice(5));
    if ((header.flags & tcp::FrameHeader::ranges) != 0) {
      describe_ranges(header, descriptors);
    } else {
      for (auto& descriptor : descriptors) {
        descriptor.index = input_.choice(8) == 7 ? input_.any_number() : input_.choice(shape_.pages);
        descriptor.length = input_.choice(8) == 7 ? input_.any_number() : input_.number() * 2U;
        header.payload_bytes += descriptor.length;
      }
    }
    header.count = static_cast<std::uint32_t>(descriptors.size());
    if (input_.choice(32) == 31) {
      header.count = static_cast<std::uint32_t>(input_.any_number());
    }
    if (input_.choice(32) == 31) {
      header.payload_bytes = input_.any_number();
    }
    const bool has_payload = header.type == tcp::FrameType::write || header.type == tcp::FrameType::read ||
                             header.type == tcp::FrameType::read_data || header.type == tcp::FrameType::send_data;
    if (!has_payload && input_.choice(8) != 7) {
      header.payload_bytes = 0;
    }
    return bytes_of(header, descriptors);
  }

  /// With as much payload as there is said to be, if that is not too much, and with checksums of it where the flags ask for them.
  [[nodiscard]] std::vector<std::byte> bytes_of(tcp::FrameHeader& header,
                                                std::span<const tcp::Descriptor> descriptors) {
    std::vector<tcp::Reference> references;
    if ((header.flags & by_reference) != 0) {
      references = refer(header);
    }
    std::vector<std::byte> payload;
    if (header.type != tcp::FrameType::read && references.empty()) {
      payload.assign(std::min<std::size_t>(header.payload_bytes, 3 * shape_.page_size),
                     static_cast<std::byte>(0x80 + ++payloads_));
    }
    std::vector<tcp::Checksum> checksums;
    if ((header.flags & tcp::FrameHeader::with_checksums) != 0 && tcp::has_trailer(header)) {
      checksums = sum(header, payload);
    }
    std::vector<std::byte> bytes;
    const auto add = [&](std::span<const std::byte> more) { bytes.insert(bytes.end(), more.begin(), more.end()); };
    add(std::as_bytes(std::span(&header, 1)));
    add(std::as_bytes(descriptors));
    add(std::as_bytes(std::span(references)));
    add(payload);
    bytes.resize(bytes.size() + header.notification_bytes, std::byte{'n'});
    add(std::as_bytes(std::span(checksums)));
    bytes.resize(bytes.size() + (tcp::has_trailer(header) ? sizeof(tcp::FrameTrailer) : 0));
    return bytes;
  }

 private:
  /// A bit that means nothing in the protocol.
  static constexpr std::uint8_t by_reference = 128;

  [[nodiscard]] std::uint64_t some_id() {
    const std::size_t which = input_.number();
    return which < 128 && !heard_.empty() ? heard_[heard_.size() - 1 - which % heard_.size()]
           : which < 240                  ? which % 16
                                          : input_.any_number();
  }

  void fill(tcp::FrameHeader& header) {
    header.flags = input_.number();
    header.operation = input_.flag() ? ++operations_ : some_id();
    header.tag = input_.flag() ? input_.choice(4) : some_id();
    const std::size_t region = input_.choice(8);
    header.region = static_cast<std::uint32_t>(region == shape_.spared_region ? 1000 : region);
    header.first_offset = input_.choice(4) == 3 ? input_.any_number() : 0;
    header.status = input_.choice(4) == 3 ? input_.number() : 0U;
    header.notification_bytes = input_.choice(4) == 3 ? input_.number() : 0U;
    if (input_.choice(64) == 63) {
      header.magic = input_.number<std::uint32_t>();
    }
  }

  /// One range for each descriptor, some of them in blocks.
  void describe_ranges(tcp::FrameHeader& header, std::vector<tcp::Descriptor>& descriptors) {
    const std::size_t count = descriptors.size();
    descriptors.clear();
    for (std::size_t i = 0; i < count; ++i) {
      tcp::RangeDescriptor range;
      range.offset = input_.choice(8) == 7 ? input_.any_number()
                                           : input_.choice(shape_.pages) * shape_.page_size + input_.number();
      range.length = input_.choice(8) == 7 ? static_cast<std::uint32_t>(input_.any_number()) : input_.number() * 2U;
      range.region = static_cast<std::uint32_t>(input_.choice(8));
      header.payload_bytes += range.length;
      const bool in_blocks = input_.flag();
      range.region |= in_blocks ? tcp::RangeDescriptor::blocks : 0U;
      descriptors.push_back(std::bit_cast<tcp::Descriptor>(range));
      if (in_blocks && input_.choice(8) != 7) {
        tcp::BlockDescriptor block;
        block.size = input_.number();
        block.skip = input_.number() % 16U;
        block.stride = input_.choice(8) == 7 ? input_.any_number() : block.size + input_.number() % 64U;
        descriptors.push_back(std::bit_cast<tcp::Descriptor>(block));
      }
    }
  }

  /// In two pieces, whose lengths add up as a rule.
  [[nodiscard]] std::vector<tcp::Reference> refer(tcp::FrameHeader& header) {
    const auto address = [&] {
      return input_.choice(8) == 7 || shape_.referable == 0 ? input_.any_number()
                                                            : input_.number() * 8U % shape_.referable;
    };
    const std::uint64_t first = header.payload_bytes / 2;
    std::vector<tcp::Reference> references{{address(), first}, {address(), header.payload_bytes - first}};
    if (input_.choice(8) == 7) {
      references.back().length = input_.any_number();
    }
    if (first == 0 && input_.choice(8) != 7) {
      references.erase(references.begin());
    }
    header.references = static_cast<std::uint32_t>(references.size());
    if (input_.choice(16) == 15) {
      header.references = static_cast<std::uint32_t>(input_.any_number());
    }
    return references;
  }

  /// In two parts, of which either may differ from the payload, and which may not cover it.
  [[nodiscard]] std::vector<tcp::Checksum> sum(tcp::FrameHeader& header, std::span<std::byte> payload) {
    std::vector<tcp::Checksum> checksums;
    const std::uint64_t first = input_.choice(4) == 3 ? header.payload_bytes / 2 : 0;
    if (first != 0) {
      checksums.push_back({first, 0});
    }
    checksums.push_back({header.payload_bytes - first, 0});
    if (payload.size() == header.payload_bytes) {
      const iovec memory{payload.data(), payload.size()};
      tcp::take_checksums(std::span(&memory, 1), checksums);
    }
    const std::size_t lie = input_.choice(16);
    if (lie == 15) {
      checksums.back().length += input_.any_number();
    } else if (lie > 10) {
      checksums.back().sum ^= 1;
    }
    header.checksums = static_cast<std::uint16_t>(checksums.size());
    if (lie == 10) {
      header.checksums = input_.number<std::uint16_t>();
    }
    return checksums;
  }

  Input& input_;
  const FrameMakerShape shape_;
  std::vector<std::uint64_t> heard_;
  std::uint64_t operations_ = 0;
  unsigned payloads_ = 0;
};

}  // namespace kvferry::fuzz
