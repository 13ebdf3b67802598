// SPDX-License-Identifier: Apache-2.0
// Which buffers of a recv its sender may write into, and with which keys.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/borrowed_memory.hpp"
#include "rdma/slice_table.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

constexpr std::size_t bytes_of_slice = 4096;
constexpr std::size_t eager = 100;
constexpr std::uint32_t open_key = 11;

class OfferedBuffersTest : public ::testing::Test {
 protected:
  OfferedBuffersTest() {
    // In this order: what peers may write to, what they may not, and a dma-buf's.
    const std::uint64_t begin = address_of(memory_.data());
    regions_.add({begin, begin + bytes_of_slice, 1, open_key, true, false});
    regions_.add({begin + bytes_of_slice, begin + 2 * bytes_of_slice, 2, 22, false, false});
    regions_.add({begin + 2 * bytes_of_slice, begin + 3 * bytes_of_slice, 3, 33, true, true});
  }

  [[nodiscard]] MutableBuffer at(std::size_t offset, std::size_t size) {
    return MutableBuffer(memory_).subspan(offset, size);
  }
  /// All of them too small to be registered, as there is no device here.
  [[nodiscard]] kit::Failure offer(const std::vector<MutableBuffer>& objects) {
    return OfferedBuffers::offer(regions_, nullptr, objects, eager, offered_);
  }

  std::vector<std::byte> memory_ = std::vector<std::byte>(4 * bytes_of_slice);
  SliceTable regions_;
  OfferedBuffers offered_;
};

TEST_F(OfferedBuffersTest, AreThoseInsideOfWhatPeersMayWriteTo) {
  ASSERT_FALSE(offer({
      at(0, eager + 1),             // 0: inside
      at(bytes_of_slice - 200, 200),         // 1: up to the end
      at(bytes_of_slice - 200, 201),         // 2: over the end
      at(200, eager),               // 3: inside, but so small that it comes in messages
      at(bytes_of_slice + 500, eager + 1),   // 4: where peers may not write
      at(3 * bytes_of_slice, eager + 1),     // 5: in no region
      at(0, 0),                     // 6: nothing
  }));
  ASSERT_EQ(offered_.posted().size(), 7U);
  for (std::size_t i = 0; i < 7; ++i) {
    const bool open = i < 2;
    EXPECT_EQ(offered_.posted()[i].direct, open ? 1U : 0U) << i;
    EXPECT_EQ(offered_.posted()[i].key, open ? open_key : 0U) << i;
  }
  EXPECT_EQ(offered_.posted()[1].address, address_of(memory_.data()) + bytes_of_slice - 200);
  EXPECT_EQ(offered_.posted()[2].size, 201U);
  EXPECT_TRUE(offered_.any_direct());
  EXPECT_FALSE(offered_.revocable()) << "a region's keys outlive a recv";
}

TEST_F(OfferedBuffersTest, AreNoneWhereNoneIsOpen) {
  ASSERT_FALSE(offer({at(200, eager), at(bytes_of_slice + 500, eager + 1)}));
  EXPECT_FALSE(offered_.any_direct());
  EXPECT_TRUE(offered_.revocable());
}

TEST_F(OfferedBuffersTest, AreNotThoseOfADmaBuf) {
  EXPECT_EQ(offer({at(0, 10), at(2 * bytes_of_slice, 10)}).code, errc::not_supported);
}

}  // namespace
}  // namespace kvferry::rdma
