// SPDX-License-Identifier: Apache-2.0
// Checksums are XXH3-64, whatever vectors the CPU that takes them has, and however many pieces the memory is in: a peer may
// have others.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>
#undef XXH_INLINE_ALL

#include <kvferry/detail/xxh3.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

TEST(Xxh3, IsTheSameAsThatOfTheOldestCpuInAnyPieces) {
  std::mt19937_64 random(1);
  std::vector<std::byte> bytes(std::size_t{1} << 18);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  const auto expect_same = [&](std::size_t offset, std::size_t length, std::size_t longest_piece) {
    std::vector<iovec> pieces;
    for (std::size_t at = 0; at != length;) {
      const std::size_t size = std::min<std::size_t>(length - at, 1 + random() % longest_piece);
      pieces.push_back({bytes.data() + offset + at, size});
      at += size;
    }
    ASSERT_EQ(xxh3_of(pieces), XXH3_64bits(bytes.data() + offset, length))
        << length << " bytes from " << offset << " in " << pieces.size() << " pieces";
    if (length != 0) {
      const std::size_t skipped = random() % (pieces.front().iov_len + 1);
      const std::size_t part = random() % (length - skipped + 1);
      ASSERT_EQ(xxh3_of(pieces, skipped, part), XXH3_64bits(bytes.data() + offset + skipped, part))
          << part << " bytes from " << offset << " + " << skipped << " in " << pieces.size() << " pieces";
    }
  };
  for (std::size_t length = 0; length < 3000; ++length) {
    expect_same(length % 67, length, length + 1);
    const iovec whole{bytes.data() + length % 67, length};
    ASSERT_EQ(xxh3_of({&whole, 1}), XXH3_64bits(whole.iov_base, length)) << length;
  }
  for (int i = 0; i < 200; ++i) {
    const std::size_t offset = random() % 4096;
    const std::size_t length = random() % (bytes.size() - offset);
    expect_same(offset, length, 1000);
    const iovec whole{bytes.data() + offset, length};
    ASSERT_EQ(xxh3_of({&whole, 1}), XXH3_64bits(whole.iov_base, length)) << length << " bytes from " << offset;
  }
}

}  // namespace
}  // namespace kvferry
