// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/frame_reader.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::tcp {
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

/// Wants the payload of a write in pages of its own.
class Pages final : public FrameSink {
 public:
  explicit Pages(std::size_t count) : memory(count * size) {}

  [[nodiscard]] std::error_code check_header(const FrameHeader&) override { return {}; }
  [[nodiscard]] std::error_code begin_payload(Frame& frame, std::vector<iovec>& scatter) override {
    for (const Descriptor& descriptor : frame.descriptors) {
      scatter.push_back({memory.data() + descriptor.index * size, size});
    }
    return {};
  }
  [[nodiscard]] std::error_code end_frame(Frame&) override {
    ++frames;
    return {};
  }

  static constexpr std::size_t size = 4096;
  std::vector<std::byte> memory;
  int frames = 0;
};

std::vector<std::byte> write_of_pages(std::size_t count) {
  std::vector<std::byte> bytes = frame_with_descriptors(count);
  FrameHeader header;
  header.count = static_cast<std::uint32_t>(count);
  header.payload_bytes = count * Pages::size;
  std::memcpy(bytes.data(), &header, sizeof(header));
  for (std::size_t i = 0; i < count; ++i) {
    const Descriptor descriptor{count - 1 - i, Pages::size};
    std::memcpy(bytes.data() + sizeof(header) + i * sizeof(descriptor), &descriptor, sizeof(descriptor));
  }
  return bytes;
}

TEST(FrameReader, OneReadTakesManyPagesToWhereTheyBelong) {
  constexpr std::size_t count = 256;
  FrameReader reader;
  Pages pages(count);
  auto bytes = write_of_pages(count);
  // As much payload as a read for the header may catch.
  ASSERT_LE(bytes.size(), FrameReader::read_ahead);
  const std::size_t caught = FrameReader::read_ahead - bytes.size();
  ASSERT_LT(caught, Pages::size);
  bytes.resize(FrameReader::read_ahead, std::byte{1});
  feed(reader, bytes, pages);

  std::array<iovec, 1024> pieces;
  ASSERT_EQ(reader.prepare(pieces, count * Pages::size), count + 1) << "the pages and the next header";
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t copied = i == 0 ? caught : 0;
    EXPECT_EQ(pieces[i].iov_base, pages.memory.data() + (count - 1 - i) * Pages::size + copied);
    EXPECT_EQ(pieces[i].iov_len, Pages::size - copied);
  }
  EXPECT_GE(pieces[count].iov_len, sizeof(FrameTrailer) + sizeof(FrameHeader));
  std::memset(pieces[count].iov_base, 0, sizeof(FrameTrailer));
  ASSERT_FALSE(reader.commit(count * Pages::size - caught + sizeof(FrameTrailer), pages));
  EXPECT_EQ(pages.frames, 1);
}

TEST(FrameReader, OneReadTakesAPageThatComesAlone) {
  FrameReader reader;
  Pages pages(1);
  auto bytes = write_of_pages(1);
  bytes.resize(bytes.size() + Pages::size, std::byte{7});
  bytes.resize(bytes.size() + sizeof(FrameTrailer));
  std::array<iovec, 4> pieces;
  ASSERT_EQ(reader.prepare(pieces, bytes.size()), 1U);
  ASSERT_GE(pieces[0].iov_len, bytes.size());
  std::memcpy(pieces[0].iov_base, bytes.data(), bytes.size());
  ASSERT_FALSE(reader.commit(bytes.size(), pages));
  EXPECT_EQ(pages.frames, 1);
  EXPECT_EQ(pages.memory, std::vector<std::byte>(Pages::size, std::byte{7}));
}

TEST(FrameReader, AsksForNoMoreThanAPageWhereMemoryMayBeGone) {
  FrameReader reader;
  Pages pages(2);
  std::array<iovec, 4> pieces;
  ASSERT_EQ(reader.prepare_page(pieces), 1U);
  EXPECT_GE(pieces[0].iov_len, sizeof(FrameHeader)) << "no payload is next";
  feed(reader, write_of_pages(2), pages);
  std::size_t received = 0;
  while (received < 2 * Pages::size) {
    ASSERT_EQ(reader.prepare_page(pieces), 1U);
    const std::size_t place = received < Pages::size ? received + Pages::size : received - Pages::size;
    const std::size_t rest = Pages::size - received % Pages::size;
    EXPECT_EQ(pieces[0].iov_base, pages.memory.data() + place);
    EXPECT_EQ(pieces[0].iov_len, std::min(rest, left_on_page(pages.memory.data() + place)));
    received += pieces[0].iov_len;
    ASSERT_FALSE(reader.commit(pieces[0].iov_len, pages));
  }
}

}  // namespace
}  // namespace kvferry::tcp
