// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/blocks.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// Where each byte lies, one by one.
std::vector<std::uint64_t> positions(std::uint64_t size, std::uint64_t stride, std::uint64_t count) {
  std::vector<std::uint64_t> result;
  for (std::uint64_t block = 0; block < count; ++block) {
    for (std::uint64_t i = 0; i < size; ++i) {
      result.push_back(block * stride + i);
    }
  }
  return result;
}

TEST(Blocks, AreWhereTheirBytesAre) {
  for (const std::uint64_t size : {1U, 2U, 5U}) {
    for (const std::uint64_t gap : {0U, 1U, 7U}) {
      for (const std::uint64_t count : {1U, 2U, 4U}) {
        const std::uint64_t stride = size + gap;
        const auto expected = positions(size, stride, count);
        const Blocks blocks = Blocks::of(RemoteRange::strided(0, 99, size, stride, count));
        EXPECT_EQ(blocks.bytes, expected.size());
        const std::size_t extent = static_cast<std::size_t>(expected.back() + 1);
        const Blocks local = Blocks::of(extent, {static_cast<std::size_t>(size), static_cast<std::size_t>(stride)});
        EXPECT_EQ(local.bytes, expected.size());
        for (std::uint64_t from = 0; from <= blocks.bytes; ++from) {
          for (std::uint64_t length = 0; from + length <= blocks.bytes; ++length) {
            std::vector<std::uint64_t> found;
            std::uint64_t pieces = 0;
            blocks.for_each_piece(from, length, [&](std::uint64_t position, std::uint64_t part) {
              ++pieces;
              for (std::uint64_t i = 0; i < part; ++i) {
                found.push_back(position + i);
              }
            });
            ASSERT_TRUE(std::equal(found.begin(), found.end(), expected.begin() + static_cast<std::ptrdiff_t>(from),
                                   expected.begin() + static_cast<std::ptrdiff_t>(from + length)));
            if (length != 0) {
              EXPECT_EQ(blocks.pieces(from, length), pieces);
              EXPECT_GE(blocks.bytes_of_pieces(from, pieces), length);
              EXPECT_LE(blocks.pieces(from, blocks.bytes_of_pieces(from, pieces)), pieces);
            }
          }
        }
      }
    }
  }
}

TEST(Blocks, ThatTouchAreOne) {
  EXPECT_EQ(Blocks::of(RemoteRange::strided(0, 0, 10, 10, 1000)).pieces(5, 9000), 1U);
  EXPECT_EQ(Blocks::of(1000, {10, 10}).pieces(5, 900), 1U);
  EXPECT_EQ(Blocks::of(RemoteRange::strided(0, 0, 10, 11, 1000)).pieces(5, 9000), 901U);
}

TEST(Blocks, OfNothingHaveNoBytes) {
  for (const Blocks& blocks :
       {Blocks::of(RemoteRange::contiguous(0, 7, 0)), Blocks::of(RemoteRange::strided(0, 7, 4, 8, 0)),
        Blocks::of(RemoteRange::strided(0, 7, 0, 8, 9)), Blocks::of(0, {4, 8}), Blocks::of(0, {})}) {
    EXPECT_EQ(blocks.bytes, 0U);
    EXPECT_EQ(blocks.bytes_of_pieces(0, 1000), 0U);
    EXPECT_EQ(blocks.pieces(0, 0), 1U) << "an empty object is described as well";
    blocks.for_each_piece(0, 0, [](std::uint64_t, std::uint64_t) { ADD_FAILURE(); });
  }
}

TEST(LocalBytes, AreTheBuffersOrBlocksOfThem) {
  std::vector<std::byte> memory(100);
  const MutableBuffer all(memory);
  const std::vector<MutableBuffer> objects{all.first(22), all.subspan(50, 9)};
  const std::vector<LocalStride> strides{{4, 6}, {}};
  EXPECT_EQ(LocalBytes(objects, {}).total(), 31U);
  const LocalBytes blocks(objects, strides);
  EXPECT_EQ(blocks.size(0), 16U);
  EXPECT_EQ(blocks.size(1), 9U);
  EXPECT_EQ(blocks.total(), 25U);
  EXPECT_EQ(blocks.total(1, 2), 9U);
  std::vector<std::pair<std::ptrdiff_t, std::size_t>> pieces;
  blocks.for_each_piece(
      0, 2, 8, [&](const std::byte* data, std::size_t length) { pieces.emplace_back(data - memory.data(), length); });
  EXPECT_EQ(pieces, (std::vector<std::pair<std::ptrdiff_t, std::size_t>>{{2, 2}, {6, 4}, {12, 2}}));
  EXPECT_EQ(blocks.place(0, 9).position, 13U);
  EXPECT_EQ(blocks.place(0, 9).available, 3U);
}

}  // namespace
}  // namespace kvferry::kit
