// SPDX-License-Identifier: Apache-2.0
#include "tcp/frame_reader.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace kvferry::tcp {
namespace {

/// Takes any frame, and notes for how many descriptors there is room.
class RoomForDescriptors final : public FrameSink {
 public:
  [[nodiscard]] std::error_code check_header(const FrameHeader&) override { return {}; }
  [[nodiscard]] std::error_code begin_payload(Frame& frame, std::vector<iovec>&) override {
    rooms.push_back(frame.descriptors.capacity());
    return {};
  }
  [[nodiscard]] std::error_code end_frame(Frame& frame) override {
    counts.push_back(frame.descriptors.size());
    return {};
  }

  std::vector<std::size_t> rooms;
  std::vector<std::size_t> counts;
};

std::vector<std::byte> frame_with_descriptors(std::size_t count) {
  FrameHeader header;
  header.type = FrameType::recv_post;
  header.count = static_cast<std::uint32_t>(count);
  std::vector<std::byte> bytes(sizeof(header) + count * sizeof(Descriptor));
  std::memcpy(bytes.data(), &header, sizeof(header));
  return bytes;
}

void feed(FrameReader& reader, std::span<const std::byte> bytes, FrameSink& sink) {
  while (!bytes.empty()) {
    std::array<iovec, 4> pieces;
    std::size_t read = 0;
    for (const iovec& piece : std::span(pieces).first(reader.prepare(pieces, bytes.size()))) {
      const std::size_t part = std::min(piece.iov_len, bytes.size());
      std::memcpy(piece.iov_base, bytes.data(), part);
      bytes = bytes.subspan(part);
      read += part;
    }
    ASSERT_NE(read, 0U);
    ASSERT_FALSE(reader.commit(read, sink));
  }
}

TEST(FrameReader, KeepsNoMemoryForAMillionDescriptors) {
  FrameReader reader;
  RoomForDescriptors sink;
  for (const std::size_t count : {std::size_t{1} << 20, std::size_t{3}, std::size_t{600}, std::size_t{4}}) {
    feed(reader, frame_with_descriptors(count), sink);
  }
  EXPECT_EQ(sink.counts, (std::vector<std::size_t>{1 << 20, 3, 600, 4}));
  ASSERT_EQ(sink.rooms.size(), 4U);
  EXPECT_LE(sink.rooms[1], 1024U);
  EXPECT_GE(sink.rooms[3], 600U) << "what usual frames need is kept";
}

}  // namespace
}  // namespace kvferry::tcp
