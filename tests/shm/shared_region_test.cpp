// SPDX-License-Identifier: Apache-2.0
// Regions that peers map: which of them, with which rights, and when that ends.
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
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace shared {
namespace {

using kvferry::testing::PeerProcess;
using tcp::testing::fill;

using kvferry_test::long_enough;
constexpr std::size_t page = std::size_t{64} << 10;
constexpr std::size_t pages = 8;

const std::vector<std::uint64_t> all_pages{0, 1, 2, 3, 4, 5, 6, 7};

ShmOptions without_process_memory() {
  ShmOptions options;
  options.process_memory = false;
  return options;
}

/// A channel whose memory is shared, the first `pages` pages; with as much of its own behind.
struct Node {
  explicit Node(ShmOptions options = without_process_memory(), Access access = Access::read_write, bool listens = true)
      : memory(pages * page), own(pages * page) {
    options.regions = {memory.region(page, access), {own.data(), own.size(), page}};
    if (listens) {
      options.peer_init_url = kvferry::testing::own_loopback_url();
    }
    channel.emplace(kvferry_test::patient(std::move(options)));
  }

  [[nodiscard]] std::string path_to(const std::string& peer) const {
    return channel->peer_info(peer).value_or(PeerInfo{}).path;
  }
  /// Waits until the two sides have told each other what they map.
  [[nodiscard]] bool path_has(const std::string& peer, const std::string& text) const {
    const auto until = std::chrono::steady_clock::now() + long_enough;
    while (path_to(peer).find(text) == std::string::npos) {
      if (std::chrono::steady_clock::now() > until) {
        ADD_FAILURE() << text << " is not in: " << path_to(peer);
        return false;
      }
      std::this_thread::yield();
    }
    return true;
  }
  [[nodiscard]] PathStats path_stats(const std::string& name) const {
    const auto stats = channel->stats();
    const auto found = std::ranges::find(stats.paths, name, &PathStats::name);
    EXPECT_NE(found, stats.paths.end());
    return found == stats.paths.end() ? PathStats{} : *found;
  }
  [[nodiscard]] MutableBuffer object(std::size_t index) const { return {memory.data() + index * page, page}; }
  [[nodiscard]] std::vector<MutableBuffer> objects() const {
    std::vector<MutableBuffer> all;
    for (const std::uint64_t index : all_pages) {
      all.push_back(object(index));
    }
    return all;
  }
  [[nodiscard]] std::vector<ConstBuffer> sources() const {
    const auto all = objects();
    return {all.begin(), all.end()};
  }

  SharedRegion memory;
  std::vector<std::byte> own;
  std::optional<ShmTransferChannel> channel;
};

struct Pair {
  explicit Pair(ShmOptions a_options = without_process_memory(), ShmOptions b_options = without_process_memory(),
                Access access = Access::read_write)
      : b(std::move(b_options), access), a(std::move(a_options), access) {
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }
  [[nodiscard]] bool mapped() const {
    const std::string both = "1 of the peer's regions mapped; the peer maps 1 of this side's regions";
    return a.path_has("b", both) && b.path_has("a", both);
  }

  Node b;
  Node a;
};

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
  // Who has the descriptor can open the file anew, with all that its mode allows.
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
