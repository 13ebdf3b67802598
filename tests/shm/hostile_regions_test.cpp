// SPDX-License-Identifier: Apache-2.0
// Regions that a hostile peer hands out, and what else it sends in their place.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/process_memory.hpp>
#include <kvferry/shm/region_exchange.hpp>

#include "common/forbidden_calls.hpp"
#include "common/patience.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace hostile {
namespace {

using kvferry_test::long_enough;
constexpr std::size_t page = std::size_t{64} << 10;

TEST_F(HandedFiles, AreLookedAtAndNotBelieved) {
  EXPECT_EQ(map(make(MappedFile::seals)), 0);
  EXPECT_EQ(map(make(MappedFile::seals), size + 1), EINVAL) << "larger than it is";
  EXPECT_EQ(map(make(MappedFile::seals), ~std::uint64_t{0}), EINVAL);
  EXPECT_EQ(map(make(MappedFile::seals), 0), EINVAL);
  EXPECT_EQ(map(make(MappedFile::seals, false)), EINVAL) << "with holes";
  Descriptor with_pages_behind_its_end = make(0, false);
  EXPECT_EQ(::fallocate(with_pages_behind_its_end.get(), FALLOC_FL_KEEP_SIZE, size, size), 0);
  EXPECT_EQ(::fcntl(with_pages_behind_its_end.get(), F_ADD_SEALS, MappedFile::seals), 0);
  EXPECT_EQ(map(std::move(with_pages_behind_its_end)), EINVAL) << "as many pages as it is long, and holes";
  for (const int missing : {F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE, F_SEAL_SEAL}) {
    EXPECT_EQ(map(make(MappedFile::seals & ~missing)), EINVAL) << "without seal " << missing;
  }
  EXPECT_EQ(map(Descriptor(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC))), EINVAL) << "no file in memory";
  EXPECT_NE(map(Descriptor(::open("/dev/zero", O_RDONLY | O_CLOEXEC))), 0);
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  const Descriptor other(ends[1]);
  EXPECT_NE(map(Descriptor(ends[0])), 0);
}

TEST_F(HandedFiles, OfOtherKindsAreClosedAndEndTheConnectionOfWhoHasShownTheSecret) {
  for (const bool shown : {false, true}) {
    const auto ends = connected_ends();
    UnixSocket receiving(ends[0], OpenMemory());
    UnixSocket sending(ends[1], OpenMemory());
    std::array<int, 2> pipe{};
    ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC | O_NONBLOCK), 0);
    const Descriptor reads(pipe[0]);
    sending.pass(std::make_shared<const Descriptor>(pipe[1]));
    std::byte byte{};
    iovec piece{&byte, 1};
    ASSERT_EQ(sending.send({&piece, 1}), 1);
    if (shown) {
      EXPECT_EQ(receiving.receive({&piece, 1}), -1);
      EXPECT_EQ(errno, EPROTO);
    } else {
      EXPECT_EQ(receive_bytes(ends[0], {&piece, 1}), 1);
    }
    EXPECT_EQ(::read(reads.get(), &byte, 1), 0) << "somebody still has the other end";
  }
}

TEST_F(HandedFiles, AndSocketsThatLingerHoldUpNobody) {
  for (const bool before_the_secret : {true, false}) {
    const auto ends = connected_ends();
    UnixSocket receiving(ends[0], OpenMemory());
    UnixSocket sending(ends[1], OpenMemory());
    Descriptor other_end;
    sending.pass(std::make_shared<const Descriptor>(lingering_socket(other_end)));
    std::byte byte{};
    iovec piece{&byte, 1};
    ASSERT_EQ(sending.send({&piece, 1}), 1);
    auto received = std::async(std::launch::async, [&] {
      return before_the_secret ? receive_bytes(ends[0], {&piece, 1}) : receiving.receive({&piece, 1});
    });
    ASSERT_EQ(received.wait_for(long_enough), std::future_status::ready) << "it waits for the peer's socket";
    EXPECT_EQ(received.get(), before_the_secret ? 1 : -1);
  }
}

/// A filter for system calls may come between, and is for one of the threads.
TEST_F(HandedFiles, AreCopiedInTheWayThatEachOfThemNeeds) {
  const auto ends = connected_ends();
  UnixSocket receiving(ends[0], OpenMemory());
  UnixSocket sending(ends[1], OpenMemory());
  MappedRegions regions;
  std::byte byte{};
  iovec piece{&byte, 1};
  const auto map_next = [&](std::uint32_t number) {
    auto file = std::make_shared<const Descriptor>(make(MappedFile::seals));
    struct stat status {};
    EXPECT_EQ(::fstat(file->get(), &status), 0);
    sending.pass(std::move(file));
    EXPECT_EQ(sending.send({&piece, 1}), 1);
    EXPECT_EQ(receiving.receive({&piece, 1}), 1);
    EXPECT_EQ(regions.map({size, size, Access::read, number}, {number * size, status.st_ino}, false, receiving), 0U);
  };
  std::vector<std::byte> to(2 * size, std::byte{7});
  std::error_code ec;
  const auto copy = [&](std::initializer_list<std::uint32_t> numbers) {
    std::vector<iovec> from;
    for (const std::uint32_t number : numbers) {
      from.push_back({regions.list(MappedRegions::Way::mapped).find(number)->data, size});
    }
    const iovec all{to.data(), numbers.size() * size};
    return regions.read(from, {&all, 1}, ec);
  };
  using Fetched = tcp::PeerMemory::Fetched;
  map_next(0);
  std::thread([&] {
    ASSERT_TRUE(kvferry_test::forbid({__NR_process_vm_readv}));
    map_next(1);
    EXPECT_EQ(copy({1}), Fetched::all);
    EXPECT_EQ(copy({0}), Fetched::failed) << "it is no fault of this side's memory";
    EXPECT_EQ(ec, std::errc::operation_not_permitted);
  }).join();
  EXPECT_EQ(copy({0}), Fetched::all) << "another region is copied from its file";
  EXPECT_EQ(copy({0, 1}), Fetched::all);
  EXPECT_EQ(copy({1, 0}), Fetched::all);
  EXPECT_EQ(to, std::vector<std::byte>(2 * size)) << "it wasn't copied";
}

/// A peer that says what it likes of regions and references.
class HostileRegions : public HandedFiles {
 protected:
  HostileRegions() : target_(page) {
    const auto ends = connected_ends();
    socket_ = std::make_shared<UnixSocket>(ends[0], OpenMemory());
    peer_ = std::make_shared<UnixSocket>(ends[1], OpenMemory());
    memory_ = std::make_shared<ProcessMemory>(::getpid(), 1, std::make_shared<MemoryTraffic>());
    memory_->begin(socket_, false, false);
    host_ = std::make_shared<tcp::testing::Host>(
        std::vector<MemoryRegion>{{target_.data(), target_.size(), target_.size()}});
    protocol_.emplace(host_, tcp::ReadAhead::unprotected(tcp::FrameReader::read_ahead), memory_);
  }

  /// Sends a frame, with descriptors, and has the protocol take it.
  std::error_code say(const tcp::FrameHeader& header, const std::vector<tcp::Descriptor>& descriptors,
                      const std::vector<tcp::Reference>& references = {}, std::size_t trailer = 0) {
    std::vector<std::byte> bytes;
    const auto add = [&](const auto& what) {
      const auto raw = std::as_bytes(std::span(what));
      bytes.insert(bytes.end(), raw.begin(), raw.end());
    };
    add(std::span(&header, 1));
    add(descriptors);
    add(references);
    bytes.resize(bytes.size() + trailer);
    iovec piece{bytes.data(), bytes.size()};
    EXPECT_EQ(peer_->send({&piece, 1}), static_cast<ssize_t>(bytes.size()));
    for (std::size_t left = bytes.size(); left != 0;) {
      std::array<iovec, 8> pieces;
      const std::size_t count = protocol_->reader().prepare(pieces, left);
      const ssize_t got = count == 0 ? socket_->discard(std::min(left, protocol_->reader().discardable()))
                                     : socket_->receive(std::span(pieces).first(count));
      if (got <= 0) {
        ADD_FAILURE() << "nothing came";
        return errc::connection_lost;
      }
      left -= static_cast<std::size_t>(got);
      if (const auto ec = protocol_->received(static_cast<std::size_t>(got))) {
        return ec;
      }
    }
    return {};
  }

  [[nodiscard]] static std::uint64_t inode_of(const Descriptor& file) {
    struct stat status {};
    EXPECT_EQ(::fstat(file.get(), &status), 0);
    return status.st_ino;
  }
  std::error_code hand_out(std::uint32_t number, Descriptor file, std::uint64_t bytes, std::uint64_t address) {
    const std::uint64_t inode = inode_of(file);
    peer_->pass(std::make_shared<const Descriptor>(std::move(file)));
    return claim(number, inode, bytes, address);
  }
  std::error_code claim(std::uint32_t number, std::uint64_t inode, std::uint64_t bytes, std::uint64_t address) {
    tcp::FrameHeader header;
    header.type = tcp::FrameType::region_shared;
    header.region = number;
    header.operation = bytes;
    header.tag = 4096;
    header.count = 1;
    return say(header, {{inode, address}});
  }
  std::error_code write(std::uint64_t bytes, const std::vector<tcp::Reference>& references) {
    tcp::FrameHeader header;
    header.type = tcp::FrameType::write;
    header.operation = 1;
    header.count = 1;
    header.payload_bytes = bytes;
    header.references = static_cast<std::uint32_t>(references.size());
    return say(header, {{0, bytes}}, references, sizeof(tcp::FrameTrailer));
  }

  std::vector<std::byte> target_;
  std::shared_ptr<UnixSocket> socket_;
  std::shared_ptr<UnixSocket> peer_;
  std::shared_ptr<ProcessMemory> memory_;
  std::shared_ptr<tcp::testing::Host> host_;
  std::optional<tcp::LaneProtocol> protocol_;
};

TEST_F(HostileRegions, OnlyWhatIsMappedIsReferredTo) {
  constexpr std::uint64_t address = 0x10000;
  EXPECT_FALSE(hand_out(3, make(MappedFile::seals), size, address));
  ASSERT_NE(memory_->regions(tcp::PeerMemory::Way::mapped).find(3), nullptr);
  EXPECT_FALSE(write(4096, {{address + 4096, 4096}}));
  EXPECT_FALSE(write(size, {{address, size}}));
  EXPECT_EQ(protocol_->violation(), "");
  EXPECT_EQ(write(size, {{address + 4096, size}}), errc::protocol_violation) << "beyond its end";
}

TEST_F(HostileRegions, ReferencesBelowARegionAreNotThere) {
  constexpr std::uint64_t address = 0x10000;
  EXPECT_FALSE(hand_out(3, make(MappedFile::seals), size, address));
  EXPECT_EQ(write(4096, {{address - 1, 4096}}), errc::protocol_violation);
}

TEST_F(HostileRegions, ReferencesWithoutAnyRegionAreNotAllowed) {
  EXPECT_EQ(write(4096, {{0x10000, 4096}}), errc::protocol_violation);
}

TEST_F(HostileRegions, WhatIsNoSoundFileOrHasNotComeIsNotMapped) {
  EXPECT_FALSE(hand_out(0, make(MappedFile::seals), size + 4096, 1)) << "larger than it is";
  EXPECT_FALSE(hand_out(1, make(F_SEAL_SHRINK), size, 1)) << "with too few seals";
  EXPECT_FALSE(claim(2, 12345, size, 1)) << "without a descriptor";
  EXPECT_FALSE(hand_out(5, make(MappedFile::seals), size, 1));
  EXPECT_FALSE(hand_out(5, make(MappedFile::seals), size, 1)) << "once more";
  EXPECT_FALSE(hand_out(4, make(MappedFile::seals), size, 1)) << "a smaller number";
  EXPECT_EQ(memory_->regions(tcp::PeerMemory::Way::mapped).all().size(), 1U);
  EXPECT_NE(memory_->path().find("1 of the peer's regions mapped, one failed (region 4"), std::string::npos)
      << memory_->path();
}

TEST_F(HostileRegions, AChildOfTheReaderKeepsNothingOfThem) {
  const std::size_t before = open_descriptors();
  EXPECT_FALSE(hand_out(3, make(MappedFile::seals), size, 0x10000));
  ASSERT_NE(memory_->regions(tcp::PeerMemory::Way::mapped).find(3), nullptr);
  EXPECT_EQ(open_descriptors(), before);
  // The kernel copies out of the mapping, to memory that may be gone.
  const auto* const mapped = memory_->regions(tcp::PeerMemory::Way::mapped).find(3);
  std::vector<std::byte> there(4096, std::byte{7});
  const std::vector<iovec> from{{mapped->data + 100, 1000}, {mapped->data + 8192, 3096}};
  std::error_code ec;
  EXPECT_EQ(memory_->copy(tcp::PeerMemory::Way::mapped, from,
                          std::vector<iovec>{{there.data(), 1}, {there.data() + 1, 4095}}, ec),
            tcp::PeerMemory::Fetched::all);
  EXPECT_EQ(there, std::vector<std::byte>(4096));
  void* const hole = ::mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(hole, MAP_FAILED);
  EXPECT_EQ(
      memory_->copy(tcp::PeerMemory::Way::mapped, from, std::vector<iovec>{{there.data(), 100}, {hole, 3996}}, ec),
      tcp::PeerMemory::Fetched::unwritable);
  ::munmap(hole, 4096);
}

TEST_F(HostileRegions, ThePathSaysNothingOfThemBeforeTheyWereExchanged) {
  EXPECT_EQ(memory_->path(), "");
  EXPECT_FALSE(hand_out(3, make(MappedFile::seals), size, 0x10000));
  EXPECT_EQ(memory_->path(), "; 1 of the peer's regions mapped");
}

/// Starts operations and never stops them.
class StartingLink final : public kit::Link {
 public:
  explicit StartingLink(tcp::LaneProtocol& protocol) : protocol_(protocol) {}

  void start(std::shared_ptr<kit::Operation> operation) override {
    const std::size_t count = operation->object_count();
    protocol_.start(std::make_shared<tcp::StripedOperation>(std::move(operation), 1), {0, count});
  }
  void stop(std::shared_ptr<kit::Operation> /*operation*/) override {}
  void shut(std::error_code cause, const std::string& why) override { protocol_.fail(cause, why); }
  [[nodiscard]] std::string path() const override { return "a test's"; }

 private:
  tcp::LaneProtocol& protocol_;
};

TEST_F(HostileRegions, AReadThatIsMadeAloneCountsItsPiecesAndIsNoSilenceOfThePeer) {
  constexpr std::size_t count = 100;
  constexpr std::size_t apart = 64;
  ASSERT_FALSE(hand_out(3, make(MappedFile::seals), size, 0x10000));
  std::vector<std::byte> there(count * apart, std::byte{7});
  TransferRequest request;
  request.kind = TransferKind::read;
  request.peer_id = "peer";
  for (std::size_t i = 0; i < count; ++i) {
    request.objects.emplace_back(there.data() + i * apart, 1);
    request.remote_ranges.push_back(RemoteRange::contiguous(3, i * apart, 1));
  }
  asio::io_context context;
  const auto registry =
      std::make_shared<kit::OperationRegistry>(std::make_shared<kit::DeadlineQueue>(context.get_executor()), 16);
  const auto link = std::make_shared<StartingLink>(*protocol_);
  std::error_code ended = errc::not_supported;
  const auto operation = std::make_shared<kit::Operation>(
      std::move(request), Completion::direct([&](std::error_code ec, std::size_t) { ended = ec; }),
      kit::Clock::now() + long_enough, registry);
  (void)registry->add(operation);
  operation->start_on(link);
  operation->request_stop(errc::timed_out);
  EXPECT_FALSE(protocol_->looks_dead(*operation, {}, true)) << "the peer wasn't asked for anything";
  const auto copied = protocol_->copy_part();
  EXPECT_EQ(copied.bytes, count);
  EXPECT_GE(copied.pieces, 2 * count);
  EXPECT_FALSE(ended) << "all of it had been copied";
  protocol_->fail(errc::closed, "the test ends");
}

TEST_F(HostileRegions, SenselessRegionsAndAnswersEndTheConnection) {
  tcp::FrameHeader answer;
  answer.type = tcp::FrameType::region_mapped;
  EXPECT_EQ(say(answer, {}), errc::protocol_violation) << "an answer to nothing";
}

TEST_F(HostileRegions, AFloodOfThemIsBounded) {
  const std::size_t before = open_descriptors();
  std::error_code ec;
  std::uint32_t number = 0;
  for (; number < 1000 && !ec; ++number) {
    ec = hand_out(number, make(MappedFile::seals), size, 1 + number * size);
  }
  EXPECT_EQ(ec, errc::protocol_violation) << "nobody takes the answers";
  EXPECT_LE(memory_->regions(tcp::PeerMemory::Way::mapped).all().size(), tcp::PeerMemory::max_mapped);
  // Descriptors of which nothing is said.
  bool refused = false;
  for (int i = 0; i < 500 && !refused; ++i) {
    peer_->pass(std::make_shared<const Descriptor>(make(MappedFile::seals)));
    std::byte byte{};
    iovec piece{&byte, 1};
    ASSERT_EQ(peer_->send({&piece, 1}), 1);
    refused = socket_->receive({&piece, 1}) != 1;
  }
  EXPECT_TRUE(refused && errno == EPROTO) << "more than an honest peer sends ahead";
  EXPECT_LE(open_descriptors() - before, tcp::PeerMemory::max_mapped) << "what is mapped needs none";
}

}  // namespace
}  // namespace hostile
}  // namespace kvferry::shm::testing
