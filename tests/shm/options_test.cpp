// SPDX-License-Identifier: Apache-2.0
// Options of which each has to reach the part that keeps it, and regions that a host's other processes can't reach.
#include <gtest/gtest.h>

#include <sys/resource.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/shm_transfer_channel.hpp>

#include "common/half_frame.hpp"
#include "common/patience.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace options {
namespace {

/// Options of a channel whose payload goes through the socket.
ShmOptions by_socket() {
  ShmOptions made;
  made.process_memory = false;
  return made;
}

using HalfShmFrame = kvferry::testing::HalfFrame<ShmTransferChannel, ShmOptions>;

TEST(ShmFrameTimeout, EndsAConnectionOnWhichAFrameStops) {
  HalfShmFrame half(by_socket(), std::chrono::milliseconds(50));
  EXPECT_EQ(half.gone(HalfShmFrame::long_enough), errc::connection_lost);
  const std::string why = half.why();
  EXPECT_NE(why.find(" in 50 ms"), std::string::npos) << why;
  EXPECT_EQ(half.go_on(), condition::peer_failed);
}

TEST(ShmFrameTimeout, IsTenMillisecondsAtLeast) {
  HalfShmFrame half(by_socket(), std::chrono::milliseconds(0));
  EXPECT_EQ(half.gone(HalfShmFrame::long_enough), errc::connection_lost);
  const std::string why = half.why();
  EXPECT_NE(why.find(" in 10 ms"), std::string::npos) << why;
}

TEST(ShmFrameTimeout, OfForEverIsNotOver) {
  HalfShmFrame half(by_socket(), std::chrono::milliseconds::max());
  EXPECT_FALSE(half.gone(std::chrono::milliseconds(100)));
  EXPECT_FALSE(half.landed());
  EXPECT_FALSE(half.go_on());
  EXPECT_TRUE(half.landed());
}

class Open : public ShmTransferChannel {
 public:
  using ShmTransferChannel::accept;
  using ShmTransferChannel::dial;
  using ShmTransferChannel::ShmTransferChannel;
};

TEST(ShmConnecting, OnlyAPeerThatIsNotThereIsSaidToHaveGone) {
  Open channel{ShmOptions()};
  const auto host = std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{});
  std::error_code accepted;
  const auto remember = [&](std::error_code ec, const std::shared_ptr<kit::Link>&, const std::string&) {
    accepted = ec;
  };
  const auto ignore = [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {};
  const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
  const Bytes endpoint = channel.accept(host, {}, deadline, remember);
  const auto refusal = [&] {
    try {
      channel.dial("b")->connect(host, endpoint, deadline, ignore);
    } catch (const TransferError& error) {
      return std::string(error.what());
    }
    return std::string("it connects");
  };
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit none = before;
  none.rlim_cur = 3;  // all lower numbers are taken, whatever others close meanwhile
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  const std::string full = refusal();
  ::setrlimit(RLIMIT_NOFILE, &before);
  EXPECT_NE(full.find("Too many open files"), std::string::npos) << full;
  EXPECT_EQ(full.find("gone"), std::string::npos) << full;
  EXPECT_EQ(full.find("namespace"), std::string::npos) << full;
  channel.close();  // nobody waits at the name any more
  EXPECT_EQ(accepted, errc::closed);
  const std::string absent = refusal();
  EXPECT_NE(absent.find("has gone, or is on another host"), std::string::npos) << absent;
}

TEST(ShmConstruction, MemoryOfADmaBufIsRefused) {
  constexpr std::size_t page_bytes = 4096;
  std::vector<std::byte> memory(page_bytes);
  MemoryRegion region{memory.data(), memory.size(), page_bytes};
  const auto expect_refused = [](auto function, const std::string& name) {
    try {
      function();
      ADD_FAILURE() << "a region that nobody can read";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::not_supported);
      EXPECT_NE(std::string(error.what()).find(name + ": shm can't reach memory of a dma-buf"), std::string::npos)
          << error.what();
    }
  };
  region.dmabuf_fd = 0;
  expect_refused(
      [&] {
        ShmOptions made;
        made.regions = {{memory.data(), memory.size(), page_bytes}, region};
        const ShmTransferChannel channel(made);
      },
      "region 1");
  ShmTransferChannel channel((ShmOptions()));
  expect_refused([&] { (void)channel.add_region(region); }, "region 0");
  region.dmabuf_fd = -1;
  EXPECT_EQ(channel.add_region(region), 0U) << "the number wasn't used up";
}

}  // namespace
}  // namespace options
}  // namespace kvferry::shm::testing
