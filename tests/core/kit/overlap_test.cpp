// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/overlap.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

bool writes_on_itself(std::vector<std::uint64_t> indexes) {
  TransferRequest request;
  request.kind = TransferKind::write;
  request.objects.resize(indexes.size());
  request.remote_indexes = std::move(indexes);
  return lands_on_itself(request);
}

TEST(Overlap, OfAWriteIsAPageThatIsNamedTwice) {
  EXPECT_FALSE(writes_on_itself({}));
  EXPECT_FALSE(writes_on_itself({7}));
  EXPECT_FALSE(writes_on_itself({1, 2, 3}));
  EXPECT_FALSE(writes_on_itself({3, 2, 1}));
  EXPECT_TRUE(writes_on_itself({3, 3}));
  EXPECT_TRUE(writes_on_itself({3, 2, 1, 3}));
  // Far apart: more pages between the lowest and the highest than are worth a bit each.
  EXPECT_FALSE(writes_on_itself({UINT64_MAX, 0, 5}));
  EXPECT_TRUE(writes_on_itself({UINT64_MAX, 0, UINT64_MAX}));
}

TEST(Overlap, OfAWriteIsFoundWhereverItIs) {
  std::mt19937 random(1);
  for (const std::size_t count : {2UL, 63UL, 64UL, 65UL, 1000UL}) {
    for (const std::uint64_t spread : {1UL, 1000UL}) {
      std::vector<std::uint64_t> indexes(count);
      std::iota(indexes.begin(), indexes.end(), 0);
      std::ranges::for_each(indexes, [&](std::uint64_t& index) { index = index * spread + 12345; });
      std::ranges::shuffle(indexes, random);
      EXPECT_FALSE(writes_on_itself(indexes));
      indexes[random() % (count - 1)] = indexes.back();
      EXPECT_TRUE(writes_on_itself(indexes)) << count << ", " << spread;
    }
  }
}

TEST(Overlap, OfAWriteIsARangeThatReachesIntoAnother) {
  const auto writes_on_itself_in = [](std::vector<RemoteRange> ranges) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.objects.resize(ranges.size());
    request.remote_ranges = std::move(ranges);
    return lands_on_itself(request);
  };
  const auto plain = RemoteRange::contiguous;
  EXPECT_FALSE(writes_on_itself_in({plain(0, 0, 10)}));
  EXPECT_FALSE(writes_on_itself_in({plain(0, 0, 10), plain(0, 10, 10)}));
  EXPECT_FALSE(writes_on_itself_in({plain(0, 10, 10), plain(0, 0, 10)}));
  EXPECT_TRUE(writes_on_itself_in({plain(0, 9, 10), plain(0, 0, 10)}));
  EXPECT_TRUE(writes_on_itself_in({plain(0, 0, 10), plain(1, 5, 1), plain(0, 9, 1)}));
  EXPECT_FALSE(writes_on_itself_in({plain(0, 0, 10), plain(1, 5, 1), plain(2, 9, 1)}));
  EXPECT_FALSE(writes_on_itself_in({RemoteRange::strided(0, 0, 4, 8, 3), plain(0, 20, 8)}));
  EXPECT_TRUE(writes_on_itself_in({plain(0, 19, 8), RemoteRange::strided(0, 0, 4, 8, 3)}));
  EXPECT_TRUE(writes_on_itself_in({RemoteRange::strided(0, 0, 4, 8, 3), RemoteRange::strided(0, 4, 4, 8, 3)}))
      << "blocks that interleave count, too";
  EXPECT_FALSE(writes_on_itself_in({RemoteRange::strided(0, 5, 4, 8, 0), plain(0, 0, 10), plain(0, 5, 0)}))
      << "empty ones touch nothing";
}

TEST(Overlap, OfAReadIsAByteOfItsBuffersThatIsInTwoOfThem) {
  std::vector<std::byte> memory(1000);
  const MutableBuffer all(memory);
  const auto reads_on_itself = [](std::vector<MutableBuffer> buffers) {
    TransferRequest request;
    request.kind = TransferKind::read;
    request.remote_indexes.assign(buffers.size(), 3);
    request.objects = std::move(buffers);
    return lands_on_itself(request);
  };
  EXPECT_FALSE(reads_on_itself({all}));
  EXPECT_FALSE(reads_on_itself({all.first(10), all.subspan(10)}));
  EXPECT_FALSE(reads_on_itself({all.subspan(10), all.first(10)}));
  EXPECT_TRUE(reads_on_itself({all.first(11), all.subspan(10)}));
  EXPECT_TRUE(reads_on_itself({all.subspan(10), all.subspan(500, 1), all.first(10)}));
  EXPECT_TRUE(reads_on_itself({all, all}));
  EXPECT_FALSE(reads_on_itself({all.subspan(5, 0), all, all.subspan(5, 0)})) << "empty ones touch nothing";
}

}  // namespace
}  // namespace kvferry::kit
