// SPDX-License-Identifier: Apache-2.0
// Regions of shared memory by themselves.
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

using kvferry::testing::PeerProcess;
using tcp::testing::fill;

using kvferry_test::long_enough;
TEST(SharedRegions, AreZerosThatNobodyCanResizeMapForWritingOrWriteAnew) {
  SharedRegion region(100'000);
  EXPECT_EQ(region.size(), 100'000U);
  EXPECT_TRUE(std::ranges::all_of(region.bytes(), [](std::byte byte) { return byte == std::byte{0}; }));
  fill(region.bytes(), 1);
  SharedAreasView view;
  const SharedArea* const area = view.whole(region.data(), region.size());
  ASSERT_NE(area, nullptr);
  const auto file = area->file.lock();
  ASSERT_NE(file, nullptr);
  const int given = file->get();
  const std::size_t size = region.size();
  const auto can_map = [&](int descriptor, int protection) {
    void* const memory = ::mmap(nullptr, size, protection, MAP_SHARED, descriptor, 0);
    if (memory != MAP_FAILED) {
      ::munmap(memory, size);
    }
    return memory != MAP_FAILED;
  };
  EXPECT_TRUE(can_map(given, PROT_READ));
  EXPECT_FALSE(can_map(given, PROT_READ | PROT_WRITE));
  void* const read_only = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, given, 0);
  ASSERT_NE(read_only, MAP_FAILED);
  EXPECT_NE(::mprotect(read_only, size, PROT_READ | PROT_WRITE), 0);
  EXPECT_EQ(std::memcmp(read_only, region.data(), size), 0);
  ::munmap(read_only, size);
  // A process with the descriptor can open the file anew, with all that its mode allows.
  const Descriptor anew(::open(("/proc/self/fd/" + std::to_string(given)).c_str(), O_RDWR | O_CLOEXEC));
  if (anew) {
    EXPECT_FALSE(can_map(anew.get(), PROT_READ | PROT_WRITE));
    EXPECT_EQ(::pwrite(anew.get(), &size, 1, 0), -1);
    EXPECT_NE(::ftruncate(anew.get(), 0), 0);
    EXPECT_NE(::fallocate(anew.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), 0);
    EXPECT_NE(::fcntl(anew.get(), F_ADD_SEALS, F_SEAL_WRITE), 0);
  }
}

TEST(SharedRegions, AreMovedAndGoWithTheirOwner) {
  SharedRegion first(page);
  std::byte* const data = first.data();
  SharedRegion second(std::move(first));
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(first.data(), nullptr);  // NOLINT(bugprone-use-after-move): that it is empty is promised
  first = std::move(second);
  SharedAreasView view;
  EXPECT_NE(view.whole(data, page), nullptr);
  first = SharedRegion(2 * page);
  EXPECT_EQ(view.whole(data, page), nullptr);
  const iovec inside{first.data() + page, page};
  const iovec beyond{first.data() + page, page + 1};
  EXPECT_TRUE(view.cover({&inside, 1}));
  EXPECT_FALSE(view.cover({&beyond, 1}));
}

TEST(SharedRegions, SayWhatTheyCouldNotGet) {
  const auto refused = [](std::size_t size, HugePages huge) -> std::string {
    try {
      const SharedRegion region(size, huge);
    } catch (const TransferError& error) {
      return error.what();
    }
    return "none";
  };
  EXPECT_NE(refused(0, HugePages::no).find("shared region of 0 bytes"), std::string::npos);
  EXPECT_NE(refused(~std::size_t{0}, HugePages::no).find("shared region"), std::string::npos);
  // Where it is more than there is, no process is ended to make room.
  const std::string too_much = refused(std::size_t{1} << 50, HugePages::no);
  EXPECT_NE(too_much.find("this host has "), std::string::npos) << too_much;
  const std::string why = refused(std::size_t{1} << 50, HugePages::yes);
  EXPECT_NE(why.find("huge pages"), std::string::npos) << why;
}

TEST(SharedRegionLimits, ALimitForFilesIsAnErrorAndNoSignal) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{std::size_t{1} << 20, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::error_code refused;
  try {
    const SharedRegion region(std::size_t{2} << 20);
  } catch (const TransferError& error) {
    refused = error.code();
    EXPECT_NE(std::string(error.what()).find("RLIMIT_FSIZE is 1048576"), std::string::npos) << error.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(refused, std::errc::file_too_large);
}

}  // namespace
}  // namespace shared
}  // namespace kvferry::shm::testing
