// SPDX-License-Identifier: Apache-2.0
// What a forked child does with its copies of a parent's connections.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <asio/io_context.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/meeting.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/tcp/socket_events.hpp>

#include "common/patience.hpp"
#include "common/waiting_child.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace inherited {
namespace {

using kvferry_test::WaitingChild;

/// Maps other memory where the parent has a file that no child gets. @return whether there is room.
bool occupy(const std::byte* place) {
  void* const wanted = const_cast<std::byte*>(place);
  return ::mmap(wanted, RingFile::bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
                0) == wanted;
}

bool is_mapped(const std::byte* place) {
  std::array<unsigned char, RingFile::bytes / 4096 + 1> pages{};
  return ::mincore(const_cast<std::byte*>(place), RingFile::bytes, pages.data()) == 0;
}

TEST(InheritedByAChild, ASocketEndsNoConnectionOfTheParent) {
  const auto ends = connected_ends();
  auto here = std::make_unique<UnixSocket>(ends[0], OpenMemory());
  UnixSocket there(ends[1], OpenMemory());
  std::byte byte{7};
  iovec piece{&byte, 1};
  ASSERT_EQ(there.send({&piece, 1}), 1);
  WaitingChild child([&] {
    here.reset();
    return 0;
  });
  child.go_on();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_FALSE(there.hung_up());
  EXPECT_EQ(here->receive({&piece, 1}), 1) << "the child has read what had come";
}

TEST(InheritedByAChild, RingsTakeNoMemoryOfTheChild) {
  RingFile ring;
  MappedFile peers;
  Descriptor file;
  ASSERT_EQ(RingFile::make(ring, file), 0);
  ASSERT_EQ(MappedFile::map({std::move(file), {}}, RingFile::bytes, peers), 0);
  WaitingChild child([&] {
    const std::array places{static_cast<const std::byte*>(ring.data()), peers.data()};
    if (!occupy(places[0]) || !occupy(places[1])) {
      return 2;
    }
    {
      const RingFile its_ring = std::move(ring);
      MappedFile its_peers;
      its_peers = std::move(peers);
    }
    return is_mapped(places[0]) && is_mapped(places[1]) ? 0 : 1;
  });
  child.go_on();
  EXPECT_EQ(child.wait(), 0) << "2: something else was there";
}

TEST(InheritedByAChild, AMeetingGoesOnInTheParent) {
  auto context = std::make_unique<asio::io_context>();
  auto options = std::make_shared<MeetingOptions>();
  options->incarnation = 1;
  options->memory_traffic = std::make_shared<MemoryTraffic>();
  options->logger = std::make_shared<kit::Logger>();
  options->refusals = std::make_shared<kit::Refusals>(options->logger);
  options->link.lane.events = std::make_shared<tcp::SocketEvents>(context->get_executor());
  const auto number = static_cast<std::uint64_t>(::getpid());
  AcceptEndpoint endpoint{Bytes(name_bytes, std::byte{'i'}), Bytes(secret_bytes), Bytes(secret_bytes)};
  std::memcpy(endpoint.name.data(), &number, sizeof(number));
  auto meeting = std::make_shared<Meeting>(
      context->get_executor(), options, std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}),
      listen_at(endpoint.name), true, endpoint,
      [](std::error_code, const std::shared_ptr<kit::Link>&, const std::string&) {});
  kit::Attempts<Meeting> attempts;
  meeting->begin(attempts, kit::Clock::now() + kvferry_test::long_enough);
  const Descriptor connected = connect_to(endpoint.name);
  context->poll();  // it is taken
  WaitingChild child([&] {
    meeting.reset();
    context.reset();
    return 0;
  });
  child.go_on();
  EXPECT_EQ(child.wait(), 0);
  EXPECT_FALSE(UnixSocket(::dup(connected.get()), OpenMemory()).hung_up()) << "the child has ended the connection";
  EXPECT_NO_THROW((void)connect_to(endpoint.name)) << "the child has ended the listening";
  meeting->fail(errc::closed, "the test ends");
  options->link.lane.events->close();
  context->poll();
}

}  // namespace
}  // namespace inherited
}  // namespace kvferry::shm::testing
