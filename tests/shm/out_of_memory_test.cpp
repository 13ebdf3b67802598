// SPDX-License-Identifier: Apache-2.0
// Memory that is used up while two processes meet.
#include <gtest/gtest.h>

#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/kit/logger.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/shm/meeting.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/tcp/socket_events.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/failing_allocations.hpp"
#include "common/patience.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace out_of_memory {
namespace {

/// A peer dials, and has said all that it has to say.
/// @param allocations so many the accepting side gets for its last step. @return whether it wanted more.
bool meet_with(std::size_t allocations) {
  asio::io_context context;
  auto options = std::make_shared<MeetingOptions>();
  options->incarnation = 1;
  options->memory_traffic = std::make_shared<MemoryTraffic>();
  options->logger = std::make_shared<kit::Logger>();
  options->refusals = std::make_shared<kit::Refusals>(options->logger);
  options->link.lane.events = std::make_shared<tcp::SocketEvents>(context.get_executor());
  const auto number = static_cast<std::uint64_t>(::getpid());
  AcceptEndpoint endpoint{Bytes(name_bytes, std::byte{'m'}), Bytes(secret_bytes), Bytes(secret_bytes)};
  std::memcpy(endpoint.name.data(), &number, sizeof(number));
  std::shared_ptr<kit::Link> made;
  auto meeting = std::make_shared<Meeting>(
      context.get_executor(), options, std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}),
      listen_at(endpoint.name), true, endpoint,
      [&](std::error_code, std::shared_ptr<kit::Link> link, const std::string&) { made = std::move(link); });
  kit::Attempts<Meeting> attempts;
  meeting->begin(attempts, kit::Clock::now() + kvferry_test::long_enough);
  const Descriptor peer = connect_to(endpoint.name);
  Greeting said;  // the secret is zeroes, and so is the incarnation of the harness's peer
  const auto say = [&](std::uint64_t magic) {
    said.magic = magic;
    EXPECT_EQ(::send(peer.get(), &said, sizeof(said), MSG_NOSIGNAL), ssize_t{sizeof(said)});
  };
  say(Greeting::dialing);
  context.poll();
  Greeting answer;
  iovec piece{&answer, sizeof(answer)};
  EXPECT_EQ(receive_bytes(peer.get(), {&piece, 1}), ssize_t{sizeof(answer)});
  say(Greeting::settled);
  meeting.reset();  // what it waits for keeps it
  test::allocation_refused = false;
  test::allocations_left = allocations;
  try {
    context.poll();
  } catch (const std::bad_alloc&) {
    // As `IoThreads` does.
  }
  test::allocations_left = test::unlimited_allocations;
  EXPECT_TRUE(kvferry::testing::wait_readable(peer.get(), std::chrono::milliseconds(1)))
      << "the peer isn't told, with memory for " << allocations << " allocations";
  attempts.close([](Meeting& left) { left.fail(errc::closed, "the test ends"); });
  if (made) {
    made->shut(errc::closed, "the test ends");
  }
  options->link.lane.events->close();
  context.restart();
  context.poll();
  return test::allocation_refused;
}

TEST(MeetingsOutOfMemory, LeaveNoDescriptorBehind) {
  (void)meet_with(test::unlimited_allocations);
  const std::size_t before = open_descriptors();
  std::size_t allocations = 0;
  while (meet_with(allocations)) {
    ASSERT_EQ(open_descriptors(), before) << "with memory for " << allocations << " allocations";
    ASSERT_LT(++allocations, 1000U);
  }
  EXPECT_GT(allocations, 3U);
}

}  // namespace
}  // namespace out_of_memory
}  // namespace kvferry::shm::testing
