// SPDX-License-Identifier: Apache-2.0
// Memory that peers map: which of it, with which rights, and when that ends.
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

TEST(SharedMemory, ReadsAreCopiesByTheirInitiatorOfWhichThePeerHearsNothing) {
  Pair pair;
  ASSERT_TRUE(pair.mapped());
  fill(pair.b.memory.bytes(), 2);
  const auto socket_before = pair.b.path_stats("socket").bytes_in;
  EXPECT_EQ(pair.a.channel->batched_read(pair.a.objects(), {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  EXPECT_EQ(pair.a.path_stats("shared memory").bytes_in, pages * page);
  EXPECT_EQ(pair.b.path_stats("socket").bytes_in, socket_before);
  // Into memory that isn't shared: the kernel copies.
  std::vector<std::byte> elsewhere(page);
  const std::vector<std::uint64_t> index{3};
  pair.a.channel->batched_read({MutableBuffer(elsewhere)}, {.peer_id = "b", .remote_indexes = index});
  EXPECT_TRUE(std::ranges::equal(elsewhere, pair.b.object(3)));
  EXPECT_EQ(pair.a.path_stats("shared memory").bytes_in, (pages + 1) * page);
  // Ranges, of which one lies in a region that isn't mapped: all of them are asked for.
  const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 100, page), RemoteRange::contiguous(1, 0, page)};
  fill({pair.b.own.data(), pair.b.own.size()}, 3);
  pair.a.channel->batched_read({pair.a.object(0), pair.a.object(1)}, {.peer_id = "b", .remote_ranges = ranges});
  EXPECT_TRUE(std::ranges::equal(pair.a.object(0), pair.b.memory.bytes().subspan(100, page)));
  EXPECT_TRUE(std::ranges::equal(pair.a.object(1), std::span(pair.b.own).first(page)));
  EXPECT_GT(pair.b.path_stats("socket").bytes_in, socket_before);
}

TEST(SharedMemory, WritesAreCopiedByTheirTargetAndTheirBytesDoNotPassTheSocket) {
  Pair pair;
  ASSERT_TRUE(pair.mapped());
  fill(pair.a.memory.bytes(), 1);
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.sources(), {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  EXPECT_EQ(pair.a.path_stats("shared memory").bytes_out, pages * page);
  EXPECT_EQ(pair.b.path_stats("shared memory").bytes_in, pages * page);
  EXPECT_LT(pair.a.path_stats("socket").bytes_out, page);
  // To a region that isn't shared, and with checksums.
  EXPECT_EQ(pair.a.channel->batched_write(
                pair.a.sources(), {.peer_id = "b", .remote_indexes = all_pages, .remote_region = 1, .checksums = true}),
            pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.own));
  EXPECT_LT(pair.a.path_stats("socket").bytes_out, page);
}

TEST(SharedMemory, IsHandedOutOnlyIfThePeerMayReadIt) {
  Pair pair(without_process_memory(), without_process_memory(), Access::write);
  ASSERT_TRUE(pair.b.path_has("a", "0 of this side's regions, 2 stay unmapped (region 0 doesn't grant reading)"));
  fill(pair.a.memory.bytes(), 4);
  EXPECT_EQ(pair.a.channel->batched_write(pair.a.sources(), {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  EXPECT_EQ(pair.a.path_stats("shared memory").bytes_out, 0U);
  std::error_code ec;
  pair.a.channel->batched_read(pair.a.objects(), {.peer_id = "b", .remote_indexes = all_pages}, ec);
  EXPECT_EQ(ec, errc::access_denied);
}

TEST(SharedMemory, CopiesTouchNothingBesideTheirBytes) {
  std::vector<std::byte> from(1000);
  fill(from, 5);
  for (const auto stores : {Stores::cached, Stores::streaming}) {
    for (const std::size_t bytes : {0U, 1U, 63U, 127U, 128U, 129U, 200U, 640U, 700U}) {
      for (std::size_t at = 0; at < 130; at += 7) {
        std::vector<std::byte> to(1000, std::byte{0xaa});
        std::vector<std::byte> expected = to;
        std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(at / 2), bytes,
                    expected.begin() + static_cast<std::ptrdiff_t>(at));
        const iovec source{from.data() + at / 2, bytes};
        const iovec target{to.data() + at, bytes};
        shm::copy({&source, 1}, {&target, 1}, stores);
        ASSERT_EQ(to, expected) << bytes << " bytes at " << at;
      }
    }
  }
}

/// Cuts memory into pieces of random lengths, some of which are empty.
std::vector<iovec> cut(std::span<std::byte> memory, std::size_t most, std::mt19937& random) {
  std::vector<iovec> pieces;
  while (!memory.empty()) {
    const std::size_t length = std::min(std::uniform_int_distribution<std::size_t>(0, most)(random), memory.size());
    pieces.push_back({memory.data(), length});
    memory = memory.subspan(length);
  }
  return pieces;
}

TEST(SharedMemory, CopiesGoFromPiecesToOtherPieces) {
  std::mt19937 random(1);
  for (const auto stores : {Stores::cached, Stores::streaming}) {
    for (const std::size_t most : {100U, 5000U, 20000U}) {
      for (std::size_t shift = 0; shift < 70; shift += 23) {
        std::vector<std::byte> from(60000);
        fill(from, 6);
        std::vector<std::byte> to(from.size(), std::byte{0xaa});
        const auto source = std::span(from).subspan(shift);
        const auto target = std::span(to).subspan(100, source.size() - 100);
        shm::copy(cut(source.first(target.size()), most, random), cut(target, 3 * most, random), stores);
        EXPECT_TRUE(std::ranges::equal(target, source.first(target.size()))) << most << " bytes at most, " << shift;
        EXPECT_EQ(std::ranges::count(std::span(to).first(100), std::byte{0xaa}), 100);
      }
    }
  }
}

/// Mappings of a process with this inode.
std::size_t mappings_of(std::uint64_t inode) {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    count += line.find(" " + std::to_string(inode) + " ") != std::string::npos ? 1U : 0U;
  }
  return count;
}

TEST(SharedMemory, RegionsComeAndGoUnderReads) {
  Pair pair;
  ASSERT_TRUE(pair.mapped());
  std::atomic<bool> over{false};
  std::atomic<std::uint32_t> number{0};
  std::atomic<std::size_t> right{0};
  std::atomic<std::size_t> gone{0};
  std::vector<std::error_code> wrong;
  std::thread reader([&] {
    std::vector<std::byte> pages_read(pages * page);
    std::vector<MutableBuffer> objects;
    for (const std::uint64_t index : all_pages) {
      objects.emplace_back(pages_read.data() + index * page, page);
    }
    while (!over) {
      std::error_code ec;
      const std::uint32_t region = number;
      pair.a.channel->batched_read(objects, {.peer_id = "b", .remote_indexes = all_pages, .remote_region = region}, ec);
      if (ec == errc::region_gone) {
        ++gone;
      } else if (ec) {
        wrong.push_back(ec);
      } else if (region == 0 || std::ranges::all_of(pages_read, [&](std::byte byte) {
                   return byte == static_cast<std::byte>(region);
                 })) {
        ++right;
      } else {
        wrong.push_back(errc::checksum_mismatch);
      }
    }
  });
  for (int round = 0; round < 20; ++round) {
    SharedRegion region(pages * page);
    const std::uint64_t inode = [&] {
      SharedAreasView view;
      return view.whole(region.data(), region.size())->inode;
    }();
    const std::uint32_t added = pair.b.channel->add_region(region.region(page));
    std::ranges::fill(region.bytes(), static_cast<std::byte>(added));
    ASSERT_TRUE(pair.b.path_has("a", "the peer maps 2 of this side's regions"));
    EXPECT_EQ(mappings_of(inode), 2U) << "this side's and the peer's, which is of this process, too";
    const auto before = right.load();
    number = added;
    const auto until = std::chrono::steady_clock::now() + long_enough;
    while (right < before + 2 && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
    pair.b.channel->remove_region(added);
    // From here on it is this side's own again, and nobody reads it for an operation that succeeds.
    EXPECT_EQ(mappings_of(inode), 1U);
    std::ranges::fill(region.bytes(), std::byte{0xee});
  }
  over = true;
  reader.join();
  EXPECT_TRUE(wrong.empty()) << wrong.size() << ", the first: " << wrong.front().message();
  EXPECT_GT(right, 0U);
}

/// It is stopped while it reads, so that it can't confirm the removal; then goes on.
TEST(SharedMemory, WhatAStoppedPeerReadsOfARegionThatIsTakenBackCountsForNothing) {
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    Node node(without_process_memory(), Access::read_write, false);
    const auto url = line.read_line(long_enough);
    node.channel->lazy_init_peer_connection("reader", "b", *url);
    EXPECT_TRUE(node.path_has("b", "1 of the peer's regions mapped"));
    std::error_code ec;
    std::size_t reads = 0;
    bool sound = true;
    while (!ec) {
      node.channel->batched_read(node.objects(), {.peer_id = "b", .remote_indexes = all_pages}, ec);
      if (!ec) {
        if (++reads == 1) {
          line.write_line(std::to_string(::getpid()));
        }
        sound = sound && std::ranges::all_of(node.memory.bytes(), [](std::byte byte) { return byte == std::byte{1}; });
      }
    }
    line.write_line((sound ? "sound " : "unsound ") + std::to_string(reads) + " " + ec.message());
    return;
  }
  Node node;
  std::ranges::fill(node.memory.bytes(), std::byte{1});
  PeerProcess process(long_enough);
  const auto pid = static_cast<pid_t>(std::stol(process.ask(node.channel->peer_init_url())));
  ASSERT_EQ(::kill(pid, SIGSTOP), 0);
  std::error_code ec;
  node.channel->remove_region(0, std::chrono::milliseconds(200), ec);
  EXPECT_FALSE(ec) << ec.message();
  std::ranges::fill(node.memory.bytes(), std::byte{2});
  ASSERT_EQ(::kill(pid, SIGCONT), 0);
  const std::string verdict = process.next_line();
  EXPECT_EQ(verdict.substr(0, 6), "sound ") << verdict;
  EXPECT_TRUE(process.finish());
}

TEST(SharedMemory, AReadThatBeginsAfterThePeerWasKilledFails) {
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    Node node(without_process_memory(), Access::read_write, false);
    const auto url = line.read_line(long_enough);
    node.channel->lazy_init_peer_connection("mortal " + std::to_string(::getpid()), "b", *url);
    EXPECT_TRUE(node.path_has("b", "the peer maps 1 of this side's"));
    line.write_line(std::to_string(::getpid()));
    (void)line.read_line(long_enough);
    return;
  }
  Node node;
  std::vector<std::byte> target(page);
  const std::vector<std::uint64_t> index{0};
  for (int round = 0; round < 5; ++round) {
    PeerProcess process(long_enough);
    const auto pid = static_cast<pid_t>(std::stol(process.ask(node.channel->peer_init_url())));
    const std::string id = "mortal " + std::to_string(pid);
    const TransferSpec spec{.peer_id = id, .remote_indexes = index, .timeout = long_enough};
    std::error_code ec;
    node.channel->batched_read({MutableBuffer(target)}, spec, ec);
    EXPECT_FALSE(ec) << ec.message();
    siginfo_t ended{};
    EXPECT_EQ(::kill(pid, SIGKILL), 0);
    EXPECT_EQ(::waitid(P_PID, static_cast<id_t>(pid), &ended, WEXITED | WNOWAIT), 0);
    node.channel->batched_read({MutableBuffer(target)}, spec, ec);
    EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  }
}

TEST(SharedMemory, APeerThatIsKilledWhileItReadsOrWritesIsNoticedAndAnotherOneComes) {
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    Node node(without_process_memory(), Access::read_write, false);
    std::ranges::fill(node.memory.bytes(), std::byte{7});
    const auto url = line.read_line(long_enough);
    node.channel->lazy_init_peer_connection("mortal", "b", *url);
    EXPECT_TRUE(node.path_has("b", "1 of the peer's regions mapped; the peer maps 1 of this side's"));
    line.write_line(std::to_string(::getpid()));
    for (;;) {
      node.channel->batched_write(node.sources(), {.peer_id = "b", .remote_indexes = all_pages});
      node.channel->batched_read(node.objects(), {.peer_id = "b", .remote_indexes = all_pages});
    }
  }
  Node node;
  for (int round = 0; round < 3; ++round) {
    PeerProcess process(long_enough);
    const auto pid = static_cast<pid_t>(std::stol(process.ask(node.channel->peer_init_url())));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // in the middle of something
    std::thread killer([&] { ::kill(pid, SIGKILL); });
    std::error_code ec;
    const auto until = std::chrono::steady_clock::now() + long_enough;
    std::vector<std::byte> target(page);
    const std::vector<std::uint64_t> index{0};
    while (!ec && std::chrono::steady_clock::now() < until) {
      node.channel->batched_read({MutableBuffer(target)},
                                 {.peer_id = "mortal", .remote_indexes = index, .timeout = long_enough}, ec);
    }
    killer.join();
    EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  }
}

}  // namespace
}  // namespace shared
}  // namespace kvferry::shm::testing
