// SPDX-License-Identifier: Apache-2.0
// Checksums are XXH3-64, whatever vectors the CPU that takes them has: a peer may have others.
#include <gtest/gtest.h>

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>
#undef XXH_INLINE_ALL

#include <kvferry/tcp/checksums.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

TEST(WideXxh3, IsTheSameAsThatOfTheOldestCpu) {
  std::mt19937_64 random(1);
  std::vector<std::byte> bytes(std::size_t{1} << 18);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  const auto expect_same = [&](std::size_t offset, std::size_t length) {
    const iovec memory{bytes.data() + offset, length};
    Checksum checksum;
    checksum.length = length;
    take_checksums({&memory, 1}, {&checksum, 1});
    ASSERT_EQ(checksum.sum, XXH3_64bits(memory.iov_base, length)) << length << " bytes from " << offset;
  };
  for (std::size_t length = 1; length < 3000; ++length) {
    expect_same(length % 67, length);
  }
  for (int i = 0; i < 200; ++i) {
    const std::size_t offset = random() % 4096;
    expect_same(offset, random() % (bytes.size() - offset));
  }
}

TEST(WideXxh3, SumsBeginAndEndAnywhereInThePiecesOfMemory) {
  std::mt19937_64 random(2);
  std::vector<std::byte> bytes(std::size_t{1} << 16);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  for (int i = 0; i < 300; ++i) {
    std::vector<iovec> memory;
    std::vector<std::byte> all;
    const std::size_t longest = std::size_t{1} << (1 + random() % 13);
    for (int piece = 0; piece < 20; ++piece) {
      const std::size_t size = random() % longest;  // some are empty
      const std::size_t offset = random() % (bytes.size() - size);
      memory.push_back({bytes.data() + offset, size});
      all.insert(all.end(), bytes.data() + offset, bytes.data() + offset + size);
    }
    std::vector<Checksum> checksums;
    for (std::size_t left = all.size(); left != 0;) {
      Checksum checksum;
      checksum.length = std::min<std::size_t>(left, random() % (3 * longest));
      left -= static_cast<std::size_t>(checksum.length);
      checksums.push_back(checksum);
    }
    take_checksums(memory, checksums);
    const std::byte* from = all.data();
    for (const Checksum& checksum : checksums) {
      ASSERT_EQ(checksum.sum, XXH3_64bits(from, checksum.length)) << checksum.length << " bytes, round " << i;
      from += checksum.length;
    }
    EXPECT_TRUE(differing_checksums(memory, checksums).empty());
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing
