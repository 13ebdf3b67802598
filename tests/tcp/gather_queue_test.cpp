// SPDX-License-Identifier: Apache-2.0
#include <kvferry/tcp/gather_queue.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <numeric>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

std::vector<std::byte> flatten(std::span<const iovec> pieces) {
  std::vector<std::byte> bytes;
  for (const iovec& piece : pieces) {
    const auto* data = static_cast<const std::byte*>(piece.iov_base);
    bytes.insert(bytes.end(), data, data + piece.iov_len);
  }
  return bytes;
}

TEST(GatherQueue, HandsOutBytesInOrderWhateverTheSteps) {
  std::vector<std::byte> payload(1000);
  std::iota(reinterpret_cast<unsigned char*>(payload.data()),
            reinterpret_cast<unsigned char*>(payload.data() + payload.size()), static_cast<unsigned char>(0));
  for (const std::size_t step : {1UL, 3UL, 64UL, 100UL, 5000UL}) {
    GatherQueue queue;
    FrameHeader header;
    header.operation = 42;
    queue.add_header(header);
    queue.add_view(payload.data(), payload.size());
    queue.add_copy(std::span(payload).first(10));
    queue.pin(7);
    const auto head = std::as_bytes(std::span(&header, 1));
    std::vector<std::byte> expected(head.begin(), head.end());
    expected.insert(expected.end(), payload.begin(), payload.end());
    expected.insert(expected.end(), payload.begin(), payload.begin() + 10);

    std::vector<std::byte> got;
    int unpinned = 0;
    while (!queue.empty()) {
      std::array<iovec, 4> pieces;
      const auto bytes = flatten(std::span(pieces).first(queue.front(pieces, step)));
      ASSERT_LE(bytes.size(), step);
      got.insert(got.end(), bytes.begin(), bytes.end());
      EXPECT_EQ(unpinned, 0);
      queue.consume(bytes.size(), [&](std::uint64_t owner) { unpinned += owner == 7 ? 1 : 100; });
    }
    EXPECT_EQ(got, expected);
    EXPECT_EQ(unpinned, 1);
  }
}

TEST(GatherQueue, ViewsPointToTheCallersBytes) {
  std::array<std::byte, 8> payload{};
  GatherQueue queue;
  queue.add_view(payload.data(), payload.size());
  std::array<iovec, 1> pieces;
  ASSERT_EQ(queue.front(pieces, 100), 1U);
  EXPECT_EQ(pieces[0].iov_base, payload.data());
}

TEST(GatherQueue, SeveralViewsAreSentAndPinnedLikeOneByOne) {
  std::array<std::byte, 8> first{};
  std::array<std::byte, 24> second{};
  const std::array<iovec, 2> views{iovec{first.data(), first.size()}, iovec{second.data(), second.size()}};
  GatherQueue queue;
  queue.begin_frame();
  queue.add_views(views);
  queue.pin(1);
  EXPECT_EQ(queue.bytes(), 32U);
  std::array<iovec, 4> pieces;
  ASSERT_EQ(queue.front(pieces, 100), 2U);
  EXPECT_EQ(pieces[0].iov_base, first.data());
  EXPECT_EQ(pieces[1].iov_base, second.data());
  EXPECT_EQ(pieces[1].iov_len, second.size());
  int unpinned = 0;
  const auto count = [&](std::uint64_t) { ++unpinned; };
  queue.consume(31, count);
  EXPECT_EQ(unpinned, 0);
  queue.consume(1, count);
  EXPECT_EQ(unpinned, 1);
  EXPECT_TRUE(queue.empty());
}

TEST(GatherQueue, ClearForgetsPins) {
  std::array<std::byte, 8> payload{};
  GatherQueue queue;
  queue.add_view(payload.data(), payload.size());
  queue.pin(1);
  queue.clear();
  EXPECT_TRUE(queue.empty());
  queue.add_view(payload.data(), payload.size());
  queue.consume(payload.size(), [](std::uint64_t) { FAIL(); });
}

}  // namespace
}  // namespace kvferry::tcp
