// SPDX-License-Identifier: Apache-2.0
// Bounds: the resources that a peer's regions may take, the time that closing may take, and promises of the kernel.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm/held.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/shm/unix_socket.hpp>

#include "common/patience.hpp"
#include "shm/handed_files.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace bounds {
namespace {

constexpr std::size_t page_bytes = 4096;

class BoundsOfPeers : public HandedFiles {};

TEST_F(BoundsOfPeers, OfAllConnectionsTogetherCountAndAreGivenBack) {
  struct Tag {};
  auto first = Held<Tag>::take(3, 5);
  ASSERT_TRUE(first);
  EXPECT_FALSE(Held<Tag>::take(3, 5));
  EXPECT_FALSE(Held<Tag>::take(6, 5));
  std::optional<Held<Tag>> second = Held<Tag>::take(2, 5);
  EXPECT_TRUE(second);
  Held<Tag> moved = std::move(*first);
  first.reset();
  EXPECT_FALSE(Held<Tag>::take(1, 5)) << "it was moved, not given back";
  second.reset();
  EXPECT_TRUE(Held<Tag>::take(2, 5));
}

TEST_F(BoundsOfPeers, MappedBytesOfOneFileOverAndOverAreBounded) {
  const Descriptor file = make(MappedFile::seals);
  const auto again = [&] { return PassedDescriptor{Descriptor(::dup(file.get())), {}}; };
  MappedFile one;
  MappedFile two;
  MappedFile three;
  EXPECT_EQ(MappedFile::map(again(), size, one, 2 * size), 0);
  EXPECT_EQ(MappedFile::map(again(), size, two, 2 * size), 0);
  EXPECT_EQ(MappedFile::map(again(), size, three, 2 * size), ENOMEM);
  one = MappedFile();
  EXPECT_EQ(MappedFile::map(again(), size, three, 2 * size), 0);
}

TEST_F(BoundsOfPeers, DescriptorsOfAllConnectionsAreBoundedAndWhatIsBeyondIsClosed) {
  const std::size_t before = open_descriptors();
  std::vector<std::unique_ptr<UnixSocket>> sockets;
  std::byte byte{};
  iovec piece{&byte, 1};
  constexpr std::size_t links = 40;
  for (std::size_t i = 0; i < links; ++i) {
    const auto ends = connected_ends();
    sockets.push_back(std::make_unique<UnixSocket>(ends[0], OpenMemory()));
    UnixSocket sending(ends[1], OpenMemory());
    for (int k = 0; k < 60; ++k) {
      sending.pass(std::make_shared<const Descriptor>(make(MappedFile::seals)));
    }
    ASSERT_EQ(sending.send({&piece, 1}), 1);
    ASSERT_EQ(sockets.back()->receive({&piece, 1}), 1) << "it is no fault of the peer's";
  }
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_LE(open_descriptors() - before, links + std::max<rlim_t>(limit.rlim_cur / 4, 64));
  sockets.clear();
  EXPECT_EQ(open_descriptors(), before);
}

TEST_F(BoundsOfPeers, WhatNobodyHasReadHoldsUpNoCloseOfAConnection) {
  const auto in_time = [&](std::function<void()> close) {
    auto closed = std::async(std::launch::async, std::move(close));
    const bool ready = closed.wait_for(kvferry_test::long_enough) == std::future_status::ready;
    EXPECT_TRUE(ready) << "it waits for the peer's socket";
  };
  Descriptor other_end;
  Descriptor another_end;
  std::byte byte{};
  iovec piece{&byte, 1};
  {
    const auto ends = connected_ends();
    auto receiving = std::make_unique<UnixSocket>(ends[0], OpenMemory());
    UnixSocket sending(ends[1], OpenMemory());
    sending.pass(std::make_shared<const Descriptor>(lingering_socket(other_end)));
    ASSERT_EQ(sending.send({&piece, 1}), 1);
    in_time([&] { receiving.reset(); });
  }
  {
    std::vector<std::byte> name(name_bytes, std::byte{'x'});
    const auto pid = static_cast<std::uint32_t>(::getpid());
    std::memcpy(name.data(), &pid, sizeof(pid));
    Descriptor listening = listen_at(name);
    UnixSocket sending(connect_to(name).release(), OpenMemory());
    sending.pass(std::make_shared<const Descriptor>(lingering_socket(another_end)));
    ASSERT_EQ(sending.send({&piece, 1}), 1);
    in_time([&] {
      refuse_all(listening.get());
      listening.reset();
    });
  }
}

/// From here on this thread's calls of a function, with this second argument, do nothing, and end with an errno: with 0 they succeed.
bool replace_calls(std::uint32_t function, std::optional<std::uint32_t> argument, std::uint32_t error) {
  const auto at = static_cast<std::uint32_t>(offsetof(seccomp_data, args) + sizeof(std::uint64_t));
  const std::uint8_t looks = argument ? 0 : 2;
  std::array filter{sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                    sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, function, looks, 3),
                    sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, at),
                    sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, argument.value_or(0), 0, 1),
                    sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
                    sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST(SharedRegionOnAnOldKernel, IsNotMadeWhereTheSealsAreNotKept) {
  std::error_code refused;
  std::thread([&] {  // a filter is for its thread alone, and for good
    ASSERT_TRUE(replace_calls(__NR_fcntl, F_ADD_SEALS, 0));
    try {
      const SharedRegion region(page_bytes);
    } catch (const TransferError& error) {
      refused = error.code();
    }
  })
      .join();
  EXPECT_EQ(refused, std::errc::function_not_supported);
}

TEST(SharedRegionOnAnOldKernel, IsMadeWithoutProcAsWell) {
  std::thread([] {  // so that nothing opens the file anew for reading
    ASSERT_TRUE(replace_calls(__NR_openat, std::nullopt, ENOENT));
    SharedRegion region(page_bytes);
    region.data()[0] = std::byte{7};
    const auto file = SharedAreasView().whole(region.data(), page_bytes)->file.lock();
    ASSERT_TRUE(file);
    EXPECT_EQ(::mmap(nullptr, page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file->get(), 0), MAP_FAILED);
    const std::byte other{8};
    EXPECT_EQ(::pwrite(file->get(), &other, 1, 0), -1);
    MappedFile mapped;
    ASSERT_EQ(MappedFile::map({Descriptor(::dup(file->get())), {}}, page_bytes, mapped), 0);
    EXPECT_EQ(*mapped.data(), std::byte{7});
    EXPECT_EQ(::mprotect(const_cast<std::byte*>(mapped.data()), page_bytes, PROT_READ | PROT_WRITE), -1);
  })
      .join();
}

}  // namespace
}  // namespace bounds
}  // namespace kvferry::shm::testing
