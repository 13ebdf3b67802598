// SPDX-License-Identifier: Apache-2.0
// Sockets over rings: their bells and their ends.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/io_context.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <semaphore>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/held.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp/lane.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/forbidden_calls.hpp"
#include "common/patience.hpp"
#include "common/waiting_child.hpp"
#include "shm/handed_files.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace rings {
namespace {

using kvferry::testing::PeerProcess;
using kvferry_test::forbid;
using tcp::testing::fill;

using kvferry_test::long_enough;

/// Two sockets with rings, as a meeting makes them.
class RingSockets : public HandedFiles {
 protected:
  RingSockets() { make_sockets(); }
  /// @param of_here the memory of the process that `there` takes for its peer's.
  void make_sockets(OpenMemory of_here = {}) {
    std::array<RingFile, 2> own;
    std::array<Descriptor, 2> files;
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(RingFile::make(own[i], files[i]), 0);
    }
    const auto ends = connected_ends();
    for (std::size_t i = 0; i < 2; ++i) {
      MappedFile peers;
      EXPECT_EQ(MappedFile::map({std::move(files[1 - i]), {}}, RingFile::bytes, peers), 0);
      sockets_[i] =
          std::make_shared<UnixSocket>(ends[i], i == 1 ? std::move(of_here) : OpenMemory(), PassedDescriptors(),
                                       std::make_unique<ByteRings>(std::move(own[i]), std::move(peers)));
    }
  }
  [[nodiscard]] UnixSocket& here() { return *sockets_[0]; }
  [[nodiscard]] UnixSocket& there() { return *sockets_[1]; }
  [[nodiscard]] static ssize_t send(UnixSocket& socket, std::string text) {
    iovec piece{text.data(), text.size()};
    return socket.send({&piece, 1});
  }
  [[nodiscard]] static std::string receive(UnixSocket& socket) {
    std::array<char, 100> text{};
    iovec piece{text.data(), text.size()};
    const ssize_t got = socket.receive({&piece, 1});
    return got < 0 ? "errno " + std::to_string(errno) : std::string(text.data(), static_cast<std::size_t>(got));
  }
  [[nodiscard]] static bool has_heard(const UnixSocket& socket) {
    pollfd looked_at{socket.descriptor(), POLLIN, 0};
    return ::poll(&looked_at, 1, 0) == 1;
  }
  static inline const std::string nothing = "errno " + std::to_string(EAGAIN);

  std::array<std::shared_ptr<UnixSocket>, 2> sockets_;
};

TEST_F(RingSockets, MakeNoSystemCallForWhoLooksByHimself) {
  EXPECT_EQ(receive(there()), nothing);
  EXPECT_EQ(receive(here()), nothing);
  std::thread([&] {  // a filter is for its thread alone, and for good
    ASSERT_TRUE(forbid({__NR_sendto, __NR_sendmsg, __NR_recvfrom, __NR_recvmsg, __NR_poll, __NR_ppoll}));
    for (int i = 0; i < 1000; ++i) {
      ASSERT_EQ(send(here(), "there"), 5);
      ASSERT_EQ(receive(there()), "there");
      ASSERT_EQ(receive(there()), nothing);
      ASSERT_EQ(send(there(), "and back"), 8);
      ASSERT_EQ(receive(here()), "and back");
    }
  })
      .join();
  EXPECT_FALSE(has_heard(there())) << "a bell rang though nobody waits";
}

TEST_F(RingSockets, RingForWhoWaitsAndTheBellIsNoneOfTheBytes) {
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(there().may_wait(false));
    EXPECT_FALSE(has_heard(there()));
    EXPECT_EQ(send(here(), "one"), 3);
    EXPECT_EQ(send(here(), " two"), 4);
    EXPECT_TRUE(has_heard(there()));
    there().woken();
    EXPECT_EQ(receive(there()), "one two");
    EXPECT_EQ(receive(there()), nothing);
    EXPECT_FALSE(has_heard(there())) << "the bell was not taken from the socket";
  }
}

TEST_F(RingSockets, EndBehindWhatIsInTheRing) {
  EXPECT_EQ(send(here(), "last words"), 10);
  here().operations_end();
  EXPECT_TRUE(there().hung_up());
  for (const auto copied : {UnixSocket::Copied::mapped, UnixSocket::Copied::in_place}) {
    EXPECT_EQ(there().peer(copied), UnixSocket::Peer::hung_up);
  }
  EXPECT_EQ(receive(there()), "last words");
  EXPECT_EQ(receive(there()), "");
  EXPECT_EQ(receive(there()), "");
}

TEST_F(RingSockets, TellWithoutASystemCallWhetherCopiesOfMappedMemoryCount) {
  if (!PeerProcess::is_peer()) {  // a process that hasn't forked: this one may have, in another test
    PeerProcess process(long_enough);
    EXPECT_TRUE(process.finish());
    return;
  }
  ASSERT_FALSE(RingFile::process_has_forked());
  std::thread([&] {  // a filter is for its thread alone, and for good
    ASSERT_TRUE(forbid({__NR_poll, __NR_ppoll, __NR_pread64}));
    EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::there);
    here().operations_end();
    EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::hung_up);
    EXPECT_EQ(here().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::there) << "it has been told nothing";
  })
      .join();
}

/// As one of a version that tells nothing there.
TEST_F(RingSockets, AskTheConnectionOfAPeerThatTellsNothing) {
  std::vector<std::uint64_t> silent(RingFile::bytes / sizeof(std::uint64_t));
  std::vector<std::uint64_t> own(silent.size());
  const auto bytes = [](auto& words) { return std::as_writable_bytes(std::span(words)).data(); };
  const auto ends = connected_ends();
  const UnixSocket asking(ends[0], OpenMemory(), PassedDescriptors(),
                          std::make_unique<ByteRings>(bytes(own), bytes(silent)));
  const UnixSocket other(ends[1], OpenMemory());
  EXPECT_EQ(asking.peer(UnixSocket::Copied::mapped), UnixSocket::Peer::there);
  other.operations_end();
  EXPECT_EQ(asking.peer(UnixSocket::Copied::mapped), UnixSocket::Peer::hung_up);
}

/// A child keeps the connection, over which memory may come later that it doesn't share.
TEST_F(RingSockets, AskTheConnectionOnceTheProcessHasForkedThoughItSharesNoMemory) {
  kvferry_test::WaitingChild().kill();
  EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::there);
  here().shut();  // as the kernel does when it ends: it isn't said in the rings
  EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::hung_up);
}

TEST_F(RingSockets, AskTheConnectionAboutReads) {
  EXPECT_EQ(there().peer(UnixSocket::Copied::read), UnixSocket::Peer::there);
  here().shut();
  EXPECT_EQ(there().peer(UnixSocket::Copied::read), UnixSocket::Peer::hung_up);
}

/// A child keeps the connection and shares the memory, so it may change what a process referred to that has died.
TEST_F(RingSockets, AskTheProcessOnceItHasForkedAndForMemoryInPlace) {
  const SharedRegion shared(4096);
  kvferry_test::WaitingChild child([] { return RingFile::process_has_forked() ? 1 : 0; });
  EXPECT_TRUE(RingFile::process_has_forked());
  // Of rings that there were then, and of new ones.
  for (const bool anew : {false, true}) {
    EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::there) << anew;
    here().shut();  // by whoever has the connection: it isn't said in the rings
    EXPECT_EQ(there().peer(UnixSocket::Copied::mapped), UnixSocket::Peer::hung_up) << anew;
    make_sockets();
  }
  static const int known = 0;
  make_sockets(open_memory(child.pid(), ::geteuid(), reinterpret_cast<std::uintptr_t>(&known)));
  for (const auto copied : {UnixSocket::Copied::mapped, UnixSocket::Copied::in_place}) {
    EXPECT_EQ(there().peer(copied), UnixSocket::Peer::there);
  }
  child.go_on();
  EXPECT_EQ(child.wait(), 0) << "the child has no children of its own";
  for (const auto copied : {UnixSocket::Copied::mapped, UnixSocket::Copied::in_place}) {
    EXPECT_EQ(there().peer(copied), UnixSocket::Peer::dead);
  }
}

/// The operation's memory may be used for other things as soon as its end is known, and the peer may still copy.
TEST_F(RingSockets, TellTheirEndBeforeAnOperationEndsOfIt) {
  asio::io_context context;
  const auto deadlines = std::make_shared<kit::DeadlineQueue>(context.get_executor());
  const auto registry = std::make_shared<kit::OperationRegistry>(deadlines, 16);
  const auto lane = std::make_shared<tcp::Lane>(
      tcp::Lane::Connection{context.get_executor(), sockets_[0], "here", "there"},
      std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}),
      tcp::Lane::Options{std::chrono::seconds(1), std::make_shared<tcp::SocketEvents>(context.get_executor()), {}},
      std::weak_ptr<tcp::Lane::Owner>());
  lane->run({});
  std::vector<std::byte> object(64);
  TransferRequest request;
  request.kind = TransferKind::send;
  request.objects = {object};
  bool ended = false;
  auto told = UnixSocket::Peer::there;
  const auto operation =
      std::make_shared<kit::Operation>(std::move(request), Completion::direct([&](std::error_code, std::size_t) {
                                         ended = true;
                                         told = there().peer(UnixSocket::Copied::mapped);
                                       }),
                                       kit::Clock::now() + std::chrono::hours(1), registry);
  ASSERT_FALSE(registry->add(operation));
  lane->start(std::make_shared<kit::StripedOperation>(operation, 1), {0, 1});
  EXPECT_FALSE(ended);
  ::shutdown(there().descriptor(), SHUT_WR);  // the peer has gone: the lane fails by itself
  const auto until = std::chrono::steady_clock::now() + long_enough;
  while (!ended && std::chrono::steady_clock::now() < until) {
    context.run_one_for(std::chrono::milliseconds(10));
  }
  EXPECT_TRUE(ended);
  EXPECT_EQ(told, UnixSocket::Peer::hung_up);
  operation->finish(errc::closed);
  lane->shut(errc::closed, "the test ends it");
}

TEST_F(RingSockets, EndAtWhatWasInTheRingThen) {
  EXPECT_EQ(send(here(), "last words"), 10);
  here().operations_end();
  there().woken();
  std::array<char, 4> some{};
  iovec piece{some.data(), some.size()};
  ASSERT_EQ(there().receive({&piece, 1}), 4);
  EXPECT_EQ(receive(there()), " words");
  EXPECT_EQ(receive(there()), "");
  // A peer that has hung up can still write to its own memory.
  (void)send(here(), "on and on");
  EXPECT_FALSE(there().over());
  EXPECT_EQ(receive(there()), "");
}

/// It hangs up between a look at the ring and one at the socket.
TEST_F(RingSockets, EndBehindWhatHasJustComeIntoTheRing) {
  for (int round = 0; round < 200; ++round) {
    make_sockets();
    std::atomic<bool> looks{false};
    std::thread sender([&] {
      while (!looks) {
      }
      EXPECT_EQ(send(here(), "last words"), 10);
      here().operations_end();
    });
    looks = true;
    std::string got = nothing;
    while (got == nothing) {
      there().woken();
      got = receive(there());
    }
    EXPECT_EQ(got, "last words");
    sender.join();
  }
}

TEST_F(RingSockets, OfAProcessThatIsGoneEndForWhoNeverSleeps) {
  EXPECT_EQ(receive(there()), nothing);
  sockets_[0].reset();
  std::string got = nothing;
  for (int looks = 0; looks < 1000 && got == nothing; ++looks) {
    got = receive(there());
  }
  EXPECT_EQ(got, "");
}

TEST_F(RingSockets, PassDescriptorsAheadOfWhatIsSaidOfThem) {
  Descriptor file = make(MappedFile::seals);
  struct stat status {};
  ASSERT_EQ(::fstat(file.get(), &status), 0);
  EXPECT_EQ(receive(there()), nothing);
  here().pass(std::make_shared<const Descriptor>(std::move(file)));
  EXPECT_EQ(send(here(), "of it"), 5);
  EXPECT_EQ(receive(there()), "of it");
  EXPECT_TRUE(there().take_passed(status.st_ino).file);
  EXPECT_FALSE(there().take_passed(status.st_ino).file);
}

TEST_F(RingSockets, EndTheConnectionOfWhoPassesOtherThings) {
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
  const Descriptor reads(pipe[0]);
  here().pass(std::make_shared<const Descriptor>(pipe[1]));
  EXPECT_EQ(send(here(), "x"), 1);
  there().woken();
  EXPECT_EQ(receive(there()), "x");
  there().woken();
  EXPECT_EQ(receive(there()), "errno " + std::to_string(EPROTO));
}

/// Who owns a lane, and what he is told of its end.
class Told final : public tcp::Lane::Owner {
 public:
  void lane_breaking(std::error_code) override {}
  void lane_broken(std::error_code ec, const std::string& sentence) override {
    cause = ec;
    why = sentence;
  }
  std::error_code cause;
  std::string why;
};

TEST_F(RingSockets, EndTheConnectionOfWhoPassesOtherThingsAndSayThatTheyDo) {
  asio::io_context context;
  const auto told = std::make_shared<Told>();
  const auto lane = std::make_shared<tcp::Lane>(
      tcp::Lane::Connection{context.get_executor(), sockets_[1], "there", "here"},
      std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{}),
      tcp::Lane::Options{std::chrono::seconds(1), std::make_shared<tcp::SocketEvents>(context.get_executor()), {}},
      told);
  lane->run({});
  std::array<int, 2> pipe{};
  ASSERT_EQ(::pipe2(pipe.data(), O_CLOEXEC), 0);
  const Descriptor reads(pipe[0]);
  const Descriptor writes(pipe[1]);
  std::byte byte{};
  iovec piece{&byte, 1};
  const int number = writes.get();
  ASSERT_EQ(send_with(here().descriptor(), {&piece, 1}, {&number, 1}), 1);
  const auto until = std::chrono::steady_clock::now() + long_enough;
  while (!told->cause && std::chrono::steady_clock::now() < until) {
    context.run_one_for(std::chrono::milliseconds(10));
  }
  EXPECT_EQ(told->cause, errc::protocol_violation);
  EXPECT_NE(told->why.find("passed"), std::string::npos) << told->why;
  lane->shut(errc::closed, "the test ends it");
}

TEST_F(RingSockets, ThrowAwayWhatIsAskedFor) {
  EXPECT_EQ(send(here(), "0123456789"), 10);
  EXPECT_EQ(there().discard(4), 4);
  EXPECT_EQ(receive(there()), "456789");
  EXPECT_EQ(there().discard(1), -1);
}

/// Blocking and other calls, in both directions at once, of sides that sleep at once, after a while, and never.
}  // namespace
}  // namespace rings
}  // namespace kvferry::shm::testing
