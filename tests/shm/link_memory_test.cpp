// SPDX-License-Identifier: Apache-2.0
// A link of shared memory by itself: its socket, and what it hands out.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm/copy.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/process_memory.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/patience.hpp"
#include "shm/handed_files.hpp"
#include "shm/shared_node.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace shared {
namespace {

TEST(UnixSocketPeer, IsNotTakenForGoneWhenASignalComes) {
  const auto ends = connected_ends();
  const UnixSocket here(ends[0], OpenMemory());
  const Descriptor there(ends[1]);
  struct sigaction before {};
  struct sigaction action {};
  action.sa_handler = [](int) {};
  ASSERT_EQ(::sigaction(SIGUSR2, &action, &before), 0);
  std::atomic<bool> done{false};
  std::thread interrupts([&done, looking = ::pthread_self()] {
    while (!done) {
      ::pthread_kill(looking, SIGUSR2);
    }
  });
  int gone = 0;
  for (int i = 0; i < 50'000; ++i) {
    gone += here.hung_up() ? 1 : 0;
  }
  done = true;
  interrupts.join();
  ::sigaction(SIGUSR2, &before, nullptr);
  EXPECT_EQ(gone, 0);
}

TEST(SharedMemoryOfANewLink, IsNotHandedOutOnceItWasRemoved) {
  for (const bool removed : {false, true}) {
    const auto ends = connected_ends();
    const auto here = std::make_shared<UnixSocket>(ends[0], OpenMemory());
    UnixSocket there(ends[1], OpenMemory());
    const auto memory = std::make_shared<ProcessMemory>(::getpid(), 1, std::make_shared<MemoryTraffic>());
    memory->begin(here, false, false);
    const SharedRegion area(page);
    const auto host = std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{area.region(page)});
    tcp::LaneProtocol protocol(host, tcp::ReadAhead::unprotected(tcp::FrameReader::read_ahead), memory);
    if (removed) {  // by who didn't know of this link yet
      errc refusal{};
      ASSERT_TRUE(host->table.remove(0, refusal));
    }
    protocol.region_added();
    std::byte byte{};
    iovec piece{&byte, 1};
    ASSERT_EQ(here->send({&piece, 1}), 1);
    ASSERT_EQ(there.receive({&piece, 1}), 1);
    const auto inode = SharedAreasView().whole(area.data(), page)->inode;
    EXPECT_EQ(static_cast<bool>(there.take_passed(inode).file), !removed);
  }
}

TEST(SharedMemoryOfANewLink, IsHandedOutBehindManyRegionsOfOtherKinds) {
  const auto ends = connected_ends();
  const auto here = std::make_shared<UnixSocket>(ends[0], OpenMemory());
  UnixSocket there(ends[1], OpenMemory());
  const auto memory = std::make_shared<ProcessMemory>(::getpid(), 1, std::make_shared<MemoryTraffic>());
  memory->begin(here, true, true);
  std::vector<std::byte> others(tcp::PeerMemory::max_mapped * 64);
  std::vector<MemoryRegion> regions;
  for (std::size_t i = 0; i < tcp::PeerMemory::max_mapped; ++i) {
    regions.push_back({others.data() + i * 64, 64, 64});
  }
  const SharedRegion area(page);
  regions.push_back(area.region(page));
  tcp::LaneProtocol protocol(std::make_shared<tcp::testing::Host>(regions),
                             tcp::ReadAhead::unprotected(tcp::FrameReader::read_ahead), memory);
  protocol.region_added();
  std::byte byte{};
  iovec piece{&byte, 1};
  ASSERT_EQ(here->send({&piece, 1}), 1);
  ASSERT_EQ(there.receive({&piece, 1}), 1);
  EXPECT_TRUE(there.take_passed(SharedAreasView().whole(area.data(), page)->inode).file);
}

}  // namespace
}  // namespace shared
}  // namespace kvferry::shm::testing
