// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/blocking_transfer.hpp>

#include <gtest/gtest.h>

#include <poll.h>

#include <memory>
#include <thread>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

bool readable(int descriptor, int timeout_ms) {
  pollfd waited{descriptor, POLLIN, 0};
  return ::poll(&waited, 1, timeout_ms) == 1;
}

TEST(BlockingTransfer, TellsHowItEnded) {
  BlockingTransfer transfer(std::make_shared<EventDescriptors>());
  EXPECT_FALSE(transfer.over());
  transfer.complete(errc::timed_out, 3);
  EXPECT_TRUE(transfer.over());
  std::error_code cause;
  EXPECT_EQ(transfer.wait(cause), 3U);
  EXPECT_EQ(cause, errc::timed_out);
}

TEST(BlockingTransfer, ItsDescriptorWakesAThreadThatWaitsForOtherThingsToo) {
  const auto events = std::make_shared<EventDescriptors>();
  for (int round = 0; round < 100; ++round) {
    const auto transfer = std::make_shared<BlockingTransfer>(events);
    const int descriptor = transfer->descriptor();
    EXPECT_FALSE(readable(descriptor, 0)) << "left over from round " << round - 1;
    std::thread completing([transfer] { transfer->complete({}, 1); });
    EXPECT_TRUE(readable(descriptor, 60'000));
    std::error_code cause;
    EXPECT_EQ(transfer->wait(cause), 1U);
    completing.join();
  }
}

TEST(BlockingTransfer, TheDescriptorOfOneThatIsOverIsReadable) {
  BlockingTransfer transfer(std::make_shared<EventDescriptors>());
  transfer.complete({}, 1);
  EXPECT_TRUE(readable(transfer.descriptor(), 0));
  std::error_code cause;
  transfer.wait(cause);
}

}  // namespace
}  // namespace kvferry::kit
