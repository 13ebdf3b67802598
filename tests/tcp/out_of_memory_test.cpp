// SPDX-License-Identifier: Apache-2.0
// Memory that is used up when a thread has something for another to do.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>

#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Whether this thread can't have a handler posted.
thread_local bool posts_fail = false;

TEST(OutOfMemory, WhoCannotHaveAnotherThreadGoOnGoesOnItself) {
  WritingLane writing;
  posts_fail = true;
  std::uint64_t sent = 0;
  EXPECT_NO_THROW(sent = writing.sent_by_start());
  posts_fail = false;
  EXPECT_GT(sent, std::uint64_t{320} << 10) << "that is as much as it would send if another thread went on";
}

}  // namespace
}  // namespace kvferry::tcp::testing

/// What Asio takes the memory of handlers from.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  void* block = nullptr;
  if (kvferry::tcp::testing::posts_fail || ::posix_memalign(&block, alignment, size) != 0) {
    return nullptr;
  }
  return block;
}
