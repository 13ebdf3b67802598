// SPDX-License-Identifier: Apache-2.0
// Checksums are XXH3-64, whatever vectors the CPU that takes them has: a peer may have others.
#include <gtest/gtest.h>

#include <sys/uio.h>

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

}  // namespace
}  // namespace kvferry::tcp::testing
