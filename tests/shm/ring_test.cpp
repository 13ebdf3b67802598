// SPDX-License-Identifier: Apache-2.0
// The rings of a connection: their bytes in order, their bells, and peers that say of them what isn't so.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

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
#include <initializer_list>
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
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/held.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/unix_socket.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "shm/handed_files.hpp"
#include "shm/meetings.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace rings {
namespace {

using kvferry::testing::PeerProcess;
using tcp::testing::fill;

constexpr std::chrono::seconds long_enough{30};
constexpr std::size_t whole = RingFile::ring_bytes;

ssize_t send(ByteRings& rings, std::span<const std::byte> bytes) {
  const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  return rings.send({&piece, 1});
}
ssize_t receive(ByteRings& rings, std::span<std::byte> bytes) {
  const iovec piece{bytes.data(), bytes.size()};
  return rings.receive({&piece, 1});
}
ssize_t receive_payload(ByteRings& rings, std::span<std::byte> bytes) {
  const iovec piece{bytes.data(), bytes.size()};
  return rings.receive_payload({&piece, 1});
}

/// Both sides in one process, with the memory of both: what a peer may do to its own, a test can do.
class TwoSides : public ::testing::Test {
 protected:
  struct alignas(4096) File {
    std::array<std::byte, RingFile::bytes> bytes{};
    std::array<std::byte, 4096> behind{};  ///< Nobody's.
  };

  static RingWords& words(File& file) { return *reinterpret_cast<RingWords*>(file.bytes.data()); }
  static void lie(File& file, std::uint64_t RingWords::*word, std::uint64_t value) {
    std::atomic_ref(words(file).*word).store(value);
  }
  [[nodiscard]] bool untouched_behind() const {
    const auto empty = [](const auto& memory) {
      return std::ranges::all_of(memory, [](std::byte one) { return one == std::byte{}; });
    };
    return empty(one_file_->behind) && empty(other_file_->behind);
  }

  std::unique_ptr<File> one_file_ = std::make_unique<File>();
  std::unique_ptr<File> other_file_ = std::make_unique<File>();
  ByteRings one_{one_file_->bytes.data(), other_file_->bytes.data()};
  ByteRings other_{other_file_->bytes.data(), one_file_->bytes.data()};
  std::vector<std::byte> bytes_ = std::vector<std::byte>(2 * whole);
  std::vector<std::byte> received_ = std::vector<std::byte>(2 * whole);
};

TEST_F(TwoSides, ARingTakesWhatItHoldsAndNoMore) {
  fill(bytes_, 1);
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(send(one_, bytes_), ssize_t{whole});
  EXPECT_EQ(send(one_, bytes_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_EQ(receive(other_, std::span(received_).first(10)), 10);
  EXPECT_EQ(send(one_, std::span(bytes_).subspan(whole)), 10);
  EXPECT_EQ(receive(other_, std::span(received_).subspan(10)), ssize_t{whole});
  EXPECT_TRUE(std::ranges::equal(std::span(received_).first(whole + 10), std::span(bytes_).first(whole + 10)));
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, EAGAIN);
}

TEST_F(TwoSides, BytesOfAnyLengthsComeInOrderRoundAndRound) {
  std::mt19937 random(1);
  std::vector<std::byte> all(20 * whole);
  fill(all, 2);
  std::size_t sent = 0;
  std::size_t got = 0;
  while (got < all.size()) {
    std::array<iovec, 3> pieces;
    std::size_t wanted = 0;
    for (iovec& piece : pieces) {
      const std::size_t length = std::min<std::size_t>(random() % (whole / 2), all.size() - sent - wanted);
      piece = {all.data() + sent + wanted, length};
      wanted += length;
    }
    if (const ssize_t count = random() % 2 == 0 ? one_.send(pieces) : one_.send_payload(pieces); count > 0) {
      sent += static_cast<std::size_t>(count);
    }
    const auto into = std::span(received_).first(1 + random() % whole);
    const ssize_t count = random() % 2 == 0 ? receive(other_, into) : receive_payload(other_, into);
    if (count > 0) {
      ASSERT_EQ(std::memcmp(received_.data(), all.data() + got, static_cast<std::size_t>(count)), 0) << "at " << got;
      got += static_cast<std::size_t>(count);
    }
  }
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, MemoryThatIsGoneIsAnErrorAndTakesNothing) {
  fill(bytes_, 3);
  ASSERT_EQ(send(one_, std::span(bytes_).first(8192)), 8192);
  auto* const memory = static_cast<std::byte*>(
      ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(::mprotect(memory + 4096, 4096, PROT_NONE), 0);
  EXPECT_EQ(receive_payload(other_, {memory + 4096, 4096}), -1);
  EXPECT_EQ(errno, EFAULT);
  const ssize_t got = receive_payload(other_, {memory, 8192});
  EXPECT_GT(got, 0);
  EXPECT_LE(got, 4096);
  EXPECT_EQ(std::memcmp(memory, bytes_.data(), static_cast<std::size_t>(std::max<ssize_t>(got, 0))), 0);
  ::munmap(memory, 8192);
}

TEST_F(TwoSides, SentMemoryThatIsGoneIsAnErrorAndPutsNothing) {
  ASSERT_TRUE(one_.kernel_copies());
  auto* const memory = static_cast<std::byte*>(
      ::mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  fill({memory, 4096}, 4);
  std::memcpy(bytes_.data(), memory, 4096);
  ASSERT_EQ(::mprotect(memory + 4096, 4096, PROT_NONE), 0);
  const iovec gone{memory + 4096, 4096};
  EXPECT_EQ(one_.send_payload({&gone, 1}), -1);
  EXPECT_EQ(errno, EFAULT);
  EXPECT_EQ(receive(other_, received_), -1);
  const iovec half_gone{memory, 8192};
  const ssize_t put = one_.send_payload({&half_gone, 1});
  EXPECT_GT(put, 0);
  EXPECT_LE(put, 4096);
  EXPECT_EQ(receive(other_, received_), put);
  EXPECT_EQ(std::memcmp(received_.data(), bytes_.data(), static_cast<std::size_t>(std::max<ssize_t>(put, 0))), 0);
  ::munmap(memory, 8192);
}

TEST_F(TwoSides, TellHowMuchRoomThereIs) {
  EXPECT_GE(one_.room(100), 100U);
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole - 10)), ssize_t{whole - 10});
  EXPECT_EQ(one_.room(100), 10U);
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_EQ(one_.room(100), 0U);
  ASSERT_EQ(receive(other_, std::span(received_).first(20)), 20);
  EXPECT_EQ(one_.room(100), 20U);
}

TEST_F(TwoSides, WhoSaysMoreThanARingHoldsIsFoundOut) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(100)), 100);
  for (const std::uint64_t lie_told : {std::uint64_t{whole + 1}, std::uint64_t{0} - 1, std::uint64_t{1} << 63}) {
    lie(*one_file_, &RingWords::sent, lie_told);
    EXPECT_FALSE(other_.may_wait(false)) << "it would wait for what can't be";
    for (const auto call : {receive, receive_payload}) {
      EXPECT_EQ(call(other_, received_), -1);
      EXPECT_EQ(errno, tcp::senseless_peer);
    }
  }
  // What was received already can't be sent again.
  lie(*one_file_, &RingWords::sent, 100);
  ASSERT_EQ(receive(other_, received_), 100);
  lie(*one_file_, &RingWords::sent, 99);
  EXPECT_EQ(receive(other_, received_), -1);
  EXPECT_EQ(errno, tcp::senseless_peer);
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, WhoTakesMoreThanWasSentIsFoundOut) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole)), ssize_t{whole});
  for (const std::uint64_t lie_told : {std::uint64_t{whole + 1}, std::uint64_t{1} << 63}) {
    lie(*other_file_, &RingWords::taken, lie_told);
    EXPECT_FALSE(one_.may_wait(true)) << "it would wait for room that can't be";
    EXPECT_EQ(send(one_, bytes_), -1);
    EXPECT_EQ(errno, tcp::senseless_peer);
  }
  lie(*other_file_, &RingWords::taken, 0);
  EXPECT_EQ(send(one_, bytes_), -1);
  EXPECT_EQ(errno, EAGAIN);
  EXPECT_TRUE(untouched_behind());
}

TEST_F(TwoSides, ABellIsDueToWhoWaitsAndOnce) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_FALSE(one_.bell_due()) << "nobody waits";
  EXPECT_FALSE(other_.may_wait(false)) << "there is something already";
  ASSERT_EQ(receive(other_, received_), 10);
  EXPECT_TRUE(other_.may_wait(false));
  EXPECT_FALSE(one_.bell_due()) << "there is nothing";
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_TRUE(one_.bell_due());
  EXPECT_FALSE(one_.bell_due()) << "it has rung";
  ASSERT_EQ(receive(other_, received_), 10);
  other_.waits_no_more();
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_FALSE(one_.bell_due());
  ASSERT_EQ(receive(other_, received_), 10);
  EXPECT_TRUE(other_.may_wait(false));
  ASSERT_EQ(send(one_, std::span(bytes_).first(10)), 10);
  EXPECT_TRUE(one_.bell_due()) << "it waits again";
}

TEST_F(TwoSides, ABellIsDueToWhoWaitsForRoomWhenThereIsSome) {
  ASSERT_EQ(send(one_, std::span(bytes_).first(whole)), ssize_t{whole});
  EXPECT_TRUE(one_.may_wait(true));
  ASSERT_EQ(receive(other_, std::span(received_).first(100)), 100);
  EXPECT_FALSE(other_.bell_due()) << "not worth it";
  EXPECT_TRUE(one_.may_wait(true)) << "likewise";
  ASSERT_EQ(receive(other_, std::span(received_).first(whole / 2)), ssize_t{whole / 2});
  EXPECT_TRUE(other_.bell_due());
  EXPECT_FALSE(one_.may_wait(true));
}

/// Two threads, each of which sleeps whenever it may: a bell that is lost stops them for good.
TEST_F(TwoSides, NoBellIsLostBetweenTwoThreads) {
  std::counting_semaphore<> bell_of_one(0);
  std::counting_semaphore<> bell_of_other(0);
  constexpr std::size_t total = 64 * whole;
  std::atomic<bool> failed{false};
  std::thread reader([&] {
    std::mt19937 random(1);
    std::vector<std::byte> into(whole);
    std::size_t got = 0;
    while (got < total && !failed) {
      const ssize_t count = receive(other_, std::span(into).first(1 + random() % 5000));
      if (count > 0) {
        for (ssize_t i = 0; i < count; ++i) {
          const auto expected = static_cast<std::byte>((got + static_cast<std::size_t>(i)) % 251);
          failed = failed || into[static_cast<std::size_t>(i)] != expected;
        }
        got += static_cast<std::size_t>(count);
        if (other_.bell_due()) {
          bell_of_one.release();
        }
      } else if (other_.may_wait(false)) {
        failed = failed || !bell_of_other.try_acquire_for(long_enough);
        other_.waits_no_more();
      }
    }
  });
  std::mt19937 random(2);
  std::vector<std::byte> from(5000);
  for (std::size_t sent = 0; sent < total && !failed;) {
    const std::size_t wanted = std::min<std::size_t>(1 + random() % from.size(), total - sent);
    for (std::size_t i = 0; i < wanted; ++i) {
      from[i] = static_cast<std::byte>((sent + i) % 251);
    }
    const ssize_t count = send(one_, std::span(from).first(wanted));
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
      if (one_.bell_due()) {
        bell_of_other.release();
      }
    } else if (one_.may_wait(true)) {
      failed = failed || !bell_of_one.try_acquire_for(long_enough);
      one_.waits_no_more();
    }
  }
  reader.join();
  EXPECT_FALSE(failed) << "other bytes came, or somebody waited in vain";
}

TEST(RingFiles, AreWhatAPeerMapsAndCantWriteTo) {
  RingFile own;
  Descriptor file;
  ASSERT_EQ(RingFile::make(own, file), 0);
  own.data()[RingFile::words_bytes] = std::byte{7};
  EXPECT_EQ(::mmap(nullptr, RingFile::bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0), MAP_FAILED);
  EXPECT_EQ(::ftruncate(file.get(), 0), -1);
  const std::byte other{8};
  EXPECT_EQ(::pwrite(file.get(), &other, 1, 0), -1);
  MappedFile mapped;
  ASSERT_EQ(MappedFile::map({std::move(file), {}}, RingFile::bytes, mapped), 0);
  EXPECT_EQ(mapped.data()[RingFile::words_bytes], std::byte{7});
}

/// From here on these calls of this thread's fail.
bool forbid(std::initializer_list<std::uint32_t> calls) {
  std::vector<sock_filter> filter{sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (const std::uint32_t call : calls) {
    filter.push_back(sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1));
    filter.push_back(sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM));
  }
  filter.push_back(sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

/// Two sockets with rings, as a meeting makes them.
class RingSockets : public HandedFiles {
 protected:
  RingSockets() { make_sockets(); }
  void make_sockets() {
    std::array<RingFile, 2> own;
    std::array<Descriptor, 2> files;
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(RingFile::make(own[i], files[i]), 0);
    }
    const auto ends = connected_ends();
    for (std::size_t i = 0; i < 2; ++i) {
      MappedFile peers;
      EXPECT_EQ(MappedFile::map({std::move(files[1 - i]), {}}, RingFile::bytes, peers), 0);
      sockets_[i].emplace(ends[i], OpenMemory(), PassedDescriptors(),
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

  std::array<std::optional<UnixSocket>, 2> sockets_;
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
  EXPECT_EQ(there().peer(), UnixSocket::Peer::hung_up);
  EXPECT_EQ(receive(there()), "last words");
  EXPECT_EQ(receive(there()), "");
  EXPECT_EQ(receive(there()), "");
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
  // Who has hung up can still write to its own memory.
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

TEST_F(RingSockets, ThrowAwayWhatIsAskedFor) {
  EXPECT_EQ(send(here(), "0123456789"), 10);
  EXPECT_EQ(there().discard(4), 4);
  EXPECT_EQ(receive(there()), "456789");
  EXPECT_EQ(there().discard(1), -1);
}

/// Blocking and other calls, in both directions at once, of sides that sleep at once, after a while, and never.
TEST(ChannelsOverRings, MoveEverythingHoweverTheirThreadsWait) {
  constexpr std::size_t page = std::size_t{16} << 10;
  constexpr std::size_t pages = 16;
  constexpr int rounds = 25;
  const std::array policies{PollPolicy::never(), PollPolicy{}, PollPolicy::always()};
  for (const PollPolicy& of_a : policies) {
    for (const PollPolicy& of_b : policies) {
      struct Node {
        explicit Node(const PollPolicy& poll, bool listens) : memory(pages * page) {
          ShmOptions options;
          options.poll = poll;
          options.process_memory = false;  // so that all of it goes through the rings
          options.log_sink = [](const LogRecord&) {};
          options.regions = {{memory.data(), memory.size(), page}};
          options.peer_init_url = listens ? "tcp://127.0.0.1:0" : "";
          channel.emplace(options);
        }
        std::vector<std::byte> memory;
        std::optional<ShmTransferChannel> channel;
      };
      Node b(of_b, true);
      Node a(of_a, false);
      a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
      const std::string path = a.channel->peer_info("b").value_or(PeerInfo{}).path;
      ASSERT_NE(path.find("headers by rings"), std::string::npos) << path;
      const auto talk = [&](Node& node, const std::string& peer, std::size_t first) {
        std::mt19937 random(static_cast<unsigned>(first));
        std::vector<std::byte> out(8 * page);
        std::vector<std::byte> back(out.size());
        for (int round = 0; round < rounds; ++round) {
          const std::size_t count = 1 + random() % 7;
          const std::size_t length = random() % 4 == 0 ? page : 1 + random() % 4096;
          fill(out, static_cast<unsigned>(random()));
          std::vector<ConstBuffer> sources;
          std::vector<MutableBuffer> targets;
          std::vector<std::uint64_t> indexes;
          for (std::size_t i = 0; i < count; ++i) {
            sources.emplace_back(out.data() + i * page, length);
            targets.emplace_back(back.data() + i * page, length);
            indexes.push_back(first + i);
          }
          node.channel->batched_write(sources, {.peer_id = peer, .remote_indexes = indexes, .notification = std::span(out).first(8)});
          node.channel->batched_read(targets, {.peer_id = peer, .remote_indexes = indexes});
          for (std::size_t i = 0; i < count; ++i) {
            ASSERT_EQ(std::memcmp(out.data() + i * page, back.data() + i * page, length), 0);
          }
        }
      };
      // Each writes to its own half of the other's memory; two threads of a's take turns at leading the lane.
      std::thread of_a_too([&] { talk(a, "b", 0); });
      std::thread from_b([&] { talk(b, "a", 0); });
      talk(a, "b", 8);
      of_a_too.join();
      from_b.join();
      for (int i = 0; i < 2 * rounds; ++i) {
        EXPECT_EQ(b.channel->receive_notification(long_enough).peer_id, "a");
      }
    }
  }
}

/// The thread of a blocking call sleeps. Others that look at the rings for it, since calls of theirs have timed out, leave it to the bell.
TEST(ChannelsOverRings, WakeACallThatSleepsThoughOthersHaveLookedMeanwhile) {
  ShmOptions options;
  options.poll = PollPolicy::never();
  options.log_sink = [](const LogRecord&) {};
  ShmTransferChannel a(options);
  options.peer_init_url = "tcp://127.0.0.1:0";
  ShmTransferChannel b(options);
  a.lazy_init_peer_connection("a", "b", b.peer_init_url());
  std::array<std::byte, 8> first{};
  std::array<std::byte, 8> second{};
  std::error_code ec;
  std::thread sleeper([&] {
    a.batched_recv({MutableBuffer(first.data(), first.size())}, {.peer_id = "b", .tag = 1, .timeout = long_enough}, ec);
  });
  const auto until = std::chrono::steady_clock::now() + long_enough;
  while (a.stats().of(TransferKind::recv).in_flight() == 0 && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  for (int i = 0; i < 5; ++i) {
    std::error_code late;
    a.batched_recv({MutableBuffer(second.data(), second.size())},
                   {.peer_id = "b", .tag = 2, .timeout = std::chrono::milliseconds(20)}, late);
    EXPECT_EQ(late, errc::timed_out);
  }
  const std::array<std::byte, 8> sent{std::byte{1}, std::byte{2}};
  // At the deadline of its own the other call would find what no bell has told it.
  std::error_code unheard;
  b.batched_send({ConstBuffer(sent.data(), sent.size())}, {.peer_id = "a", .tag = 1, .timeout = long_enough / 2}, unheard);
  EXPECT_FALSE(unheard) << unheard.message();
  sleeper.join();
  EXPECT_FALSE(ec) << ec.message();
  EXPECT_EQ(first, sent);
}

/// Where no file can be made for a ring, the bytes go through the socket, as to peers that know of none.
TEST(ChannelsOverRings, DoWithoutWhereThereCanBeNone) {
  std::vector<std::byte> memory(4096 * 4);
  ShmOptions options;
  options.log_sink = [](const LogRecord&) {};
  options.regions = {{memory.data(), memory.size(), 4096}};
  ShmTransferChannel a(options);
  std::vector<std::byte> of_b(memory.size());
  options.regions = {{of_b.data(), of_b.size(), 4096}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  ShmTransferChannel b(options);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{4096, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::error_code ec;
  a.lazy_init_peer_connection("a", "b", b.peer_init_url(), {}, {}, ec);
  ::setrlimit(RLIMIT_FSIZE, &before);
  ASSERT_FALSE(ec) << ec.message();
  EXPECT_NE(a.peer_info("b").value_or(PeerInfo{}).path.find("headers by the socket (no rings: the peer passed none)"),
            std::string::npos);
  EXPECT_NE(b.peer_info("a").value_or(PeerInfo{}).path.find("no rings: this side could not make one: File too large"),
            std::string::npos);
  fill(memory, 1);
  const std::vector<std::uint64_t> indexes{0, 1, 2, 3};
  std::vector<ConstBuffer> pages;
  for (const std::uint64_t index : indexes) {
    pages.emplace_back(memory.data() + index * 4096, 4096);
  }
  EXPECT_EQ(a.batched_write(pages, {.peer_id = "b", .remote_indexes = indexes}), 4U);
  EXPECT_EQ(memory, of_b);
}

/// A peer that does to its ring what it likes.
class RingsOfStrangers : public Meetings {
 protected:
  /// Connects as a peer would, with a ring of its own, and has the link's.
  void connect() {
    socket_ = connect_to(endpoint_.name);
    say(socket_, hello());
    Greeting answer;
    receive(answer);
    EXPECT_EQ(answer.magic, Greeting::accepting);
    PassedDescriptor links = passed_.take();
    ASSERT_TRUE(links.file);
    ASSERT_EQ(MappedFile::map(std::move(links), RingFile::bytes, links_), 0);
    Descriptor file;
    ASSERT_EQ(RingFile::make(own_, file), 0);
    pass(file);
  }
  void pass(const Descriptor& file) {
    auto settled = hello();
    settled.magic = Greeting::settled_with_ring;
    iovec piece{&settled, sizeof(settled)};
    const int number = file.get();
    ASSERT_EQ(send_with(socket_.get(), {&piece, 1}, {&number, 1}), ssize_t{sizeof(settled)});
  }
  void be_welcome(std::uint32_t with_rings = welcome_to_rings) {
    tcp::Hello welcome;
    receive(welcome);
    EXPECT_EQ(welcome.magic, tcp::Hello::accepting);
    EXPECT_EQ(welcome.reserved, with_rings);
  }
  template <class Said>
  void receive(Said& said) {
    iovec piece{&said, sizeof(said)};
    ASSERT_TRUE(kvferry::testing::wait_readable(socket_.get(), limit));
    ASSERT_EQ(passed_.receive(socket_.get(), {&piece, 1}), ssize_t{sizeof(said)});
  }
  void say_of_ring(std::uint64_t RingWords::*word, std::uint64_t value) {
    std::atomic_ref(reinterpret_cast<RingWords*>(own_.data())->*word).store(value);
    const char bell = 0;
    (void)::send(socket_.get(), &bell, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  [[nodiscard]] std::uint64_t links_word(std::uint64_t RingWords::*word) const {
    auto& words = *reinterpret_cast<RingWords*>(const_cast<std::byte*>(links_.data()));
    return std::atomic_ref(words.*word).load();
  }
  /// Has the link answer until there is no room for its answers, and for one more than that, and takes none of them.
  void fill_links_ring() {
    ByteRings rings(own_.data(), links_.data());
    tcp::FrameHeader probe;
    probe.type = tcp::FrameType::probe;
    const auto until = std::chrono::steady_clock::now() + limit;
    std::uint64_t said = 0;
    for (bool full = false; !full;) {
      full = links_word(&RingWords::sent) == whole;
      const std::uint64_t before = links_word(&RingWords::sent);
      ASSERT_EQ(send(rings, std::as_bytes(std::span(&probe, 1))), ssize_t{sizeof(probe)});
      said += sizeof(probe);
      say_of_ring(&RingWords::taken, 0);
      // Only so many may be unanswered.
      while (links_word(&RingWords::taken) != said || (!full && links_word(&RingWords::sent) == before)) {
        ASSERT_LT(std::chrono::steady_clock::now(), until);
        std::this_thread::yield();
      }
    }
    while (links_word(&RingWords::waiting) % 2 == 0) {  // it doesn't wait for room yet
      ASSERT_LT(std::chrono::steady_clock::now(), until);
      std::this_thread::yield();
    }
  }
  /// Whether the link gives the connection up.
  [[nodiscard]] bool is_cut_off() {
    const auto until = std::chrono::steady_clock::now() + limit;
    std::array<std::byte, 256> bells;
    while (std::chrono::steady_clock::now() < until) {
      iovec piece{bells.data(), bells.size()};
      if (!kvferry::testing::wait_readable(socket_.get(), limit)) {
        return false;
      }
      if (receive_bytes(socket_.get(), {&piece, 1}) == 0) {
        return true;
      }
    }
    return false;
  }

  Descriptor socket_;
  PassedDescriptors passed_;
  MappedFile links_;
  RingFile own_;
};

TEST_F(RingsOfStrangers, AreCutOffWhenTheyHaveSentMoreThanTheyHold) {
  connect();
  be_welcome();
  say_of_ring(&RingWords::sent, whole + 1);
  EXPECT_TRUE(is_cut_off());
}

TEST_F(RingsOfStrangers, AreCutOffWhenTheyHaveTakenMoreThanTheyGot) {
  connect();
  be_welcome();
  fill_links_ring();
  say_of_ring(&RingWords::taken, std::uint64_t{1} << 40);
  EXPECT_TRUE(is_cut_off());
}

/// What one says that lies is not listened to until it has an end, which it need not have.
TEST_F(RingsOfStrangers, AreCutOffWhenTheyHaveTakenMoreThanTheyGotAndTalkOn) {
  connect();
  be_welcome();
  fill_links_ring();
  // A ring that is full of the same says as much with each turn of it.
  tcp::FrameHeader frame;
  static_assert(whole % sizeof(frame) == 0);
  frame.type = tcp::FrameType::recv_cancel;  // of an operation that is over, as far as anybody knows
  frame.operation = 1'000'000;
  const std::vector<tcp::FrameHeader> idle_talk(whole / sizeof(frame), frame);
  std::memcpy(own_.data() + RingFile::words_bytes, idle_talk.data(), whole);
  std::atomic<bool> done{false};
  std::atomic<bool> talks{false};
  std::thread talker([&] {
    auto& sent = reinterpret_cast<RingWords*>(own_.data())->sent;
    while (!done) {
      std::atomic_ref(sent).store(links_word(&RingWords::taken) + whole);
      talks = true;
    }
  });
  while (!talks) {
    std::this_thread::yield();
  }
  say_of_ring(&RingWords::taken, std::uint64_t{1} << 40);  // with the bell, which wakes the link
  EXPECT_TRUE(is_cut_off());
  std::promise<void> shut;
  std::thread closer([&] {
    link_->shut(errc::closed, "the test ends");
    shut.set_value();
  });
  EXPECT_EQ(shut.get_future().wait_for(limit), std::future_status::ready) << "closing waits for the peer to be silent";
  done = true;
  talker.join();
  closer.join();
}

TEST_F(RingsOfStrangers, AreCutOffWhenTheyAreFullOfNonsense) {
  connect();
  be_welcome();
  std::mt19937 random(1);
  std::ranges::generate(own_.data() + RingFile::words_bytes, own_.data() + RingFile::bytes,
                        [&] { return static_cast<std::byte>(random()); });
  say_of_ring(&RingWords::sent, whole);
  EXPECT_TRUE(is_cut_off());
}

TEST_F(RingsOfStrangers, ThatMayChangeTheirLengthAreDoneWithout) {
  socket_ = connect_to(endpoint_.name);
  say(socket_, hello());
  Greeting answer;
  receive(answer);
  Descriptor unsealed(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(::ftruncate(unsealed.get(), static_cast<off_t>(RingFile::bytes)), 0);
  pass(unsealed);
  be_welcome(0);
  auto ended = ended_.get_future();
  ASSERT_EQ(ended.wait_for(limit), std::future_status::ready);
  EXPECT_NE(link_->path().find("headers by the socket (no rings: mapping the peer's: Invalid argument)"), std::string::npos)
      << link_->path();
}

TEST_F(RingsOfStrangers, ThatAreMoreThanARingAreDoneWithout) {
  socket_ = connect_to(endpoint_.name);
  say(socket_, hello());
  Greeting answer;
  receive(answer);
  Descriptor longer(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  const std::vector<std::byte> content(RingFile::bytes + 4096);
  ASSERT_EQ(::pwrite(longer.get(), content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
  ASSERT_EQ(::fcntl(longer.get(), F_ADD_SEALS, MappedFile::seals), 0);
  pass(longer);
  be_welcome(0);
}

TEST_F(RingsOfStrangers, ThatAreTheLinksOwnAreDoneWithout) {
  socket_ = connect_to(endpoint_.name);
  say(socket_, hello());
  Greeting answer;
  receive(answer);
  const PassedDescriptor links = passed_.take();
  ASSERT_TRUE(links.file);
  pass(links.file);
  be_welcome(0);
}

/// Of them there are as many as connections; what regions need is not theirs.
TEST_F(RingsOfStrangers, DontCountAsDescriptorsThatWerePassedForRegions) {
  connect();
  be_welcome();
  auto ended = ended_.get_future();
  ASSERT_EQ(ended.wait_for(limit), std::future_status::ready);
  ASSERT_NE(link_->path().find("headers by rings"), std::string::npos) << link_->path();
  constexpr std::uint64_t all = 1000;
  EXPECT_TRUE(Held<DescriptorsOfPeers>::take(all, all)) << "the ring's is among them";
}

TEST_F(RingsOfStrangers, ComeOneAtATime) {
  socket_ = connect_to(endpoint_.name);
  say(socket_, hello());
  Greeting answer;
  receive(answer);
  std::array<RingFile, 2> own;
  std::array<Descriptor, 2> files;
  std::array<int, 2> numbers{};
  for (std::size_t i = 0; i < files.size(); ++i) {
    ASSERT_EQ(RingFile::make(own[i], files[i]), 0);
    numbers[i] = files[i].get();
  }
  auto settled = hello();
  settled.magic = Greeting::settled_with_ring;
  iovec piece{&settled, sizeof(settled)};
  ASSERT_EQ(send_with(socket_.get(), {&piece, 1}, numbers), ssize_t{sizeof(settled)});
  auto ended = ended_.get_future();
  ASSERT_EQ(ended.wait_for(limit), std::future_status::ready);
  EXPECT_TRUE(ended.get());
}

/// Where a process has its own halves of rings mapped.
std::vector<std::uint64_t> rings_of(pid_t pid) {
  std::vector<std::uint64_t> found;
  std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("rw-s") != std::string::npos && line.find("kvferry ring") != std::string::npos) {
      found.push_back(std::stoull(line, nullptr, 16));
    }
  }
  return found;
}

/// The peer is an honest process, whose memory this one writes to behind its back. What becomes of that process is no matter.
TEST(ScribbledRings, EndOperationsAndNotThisProcess) {
  constexpr std::size_t page = 4096;
  constexpr std::size_t pages = 64;
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    std::vector<std::byte> memory(pages * page);
    ShmOptions options;
    options.process_memory = false;
    options.regions = {{memory.data(), memory.size(), page}};
    options.peer_init_url = "tcp://127.0.0.1:0";
    ShmTransferChannel channel(options);
    while (line.read_line(long_enough)) {
      line.write_line(channel.peer_init_url());
    }
    return;
  }
  std::vector<std::byte> memory(pages * page);
  std::vector<std::uint64_t> indexes(pages);
  std::vector<ConstBuffer> sources;
  std::vector<MutableBuffer> targets;
  for (std::size_t i = 0; i < pages; ++i) {
    indexes[i] = i;
    sources.emplace_back(memory.data() + i * page, page);
    targets.emplace_back(memory.data() + i * page, page);
  }
  std::size_t failed = 0;
  for (unsigned seed = 0; seed < 12; ++seed) {
    PeerProcess process(long_enough);
    const std::string url = process.ask("url");
    ShmOptions options;
    options.process_memory = false;
    options.log_sink = [](const LogRecord&) {};
    options.default_timeout = std::chrono::seconds(5);
    options.regions = {{memory.data(), memory.size(), page}};
    ShmTransferChannel channel(options);
    channel.lazy_init_peer_connection("a", "b", url);
    const auto places = rings_of(process.pid());
    ASSERT_EQ(places.size(), 1U);
    std::atomic<bool> done{false};
    std::thread scribbler([&] {
      std::mt19937_64 random(seed);
      while (!done) {
        // Words at times, and what is sent always.
        std::uint64_t value = random();
        const bool word = seed % 3 == 0 || (seed % 3 == 1 && random() % 100 == 0);
        const std::uint64_t offset =
            word ? (random() % 3) * 128 : RingFile::words_bytes + random() % (whole / sizeof(value)) * sizeof(value);
        const iovec from{&value, sizeof(value)};
        const iovec to{reinterpret_cast<void*>(places.front() + offset), sizeof(value)};
        if (::process_vm_writev(process.pid(), &from, 1, &to, 1, 0) < 0) {
          return;  // it has unmapped the ring, or has died
        }
      }
    });
    for (int i = 0; i < 50; ++i) {
      std::error_code ec;
      channel.batched_write(sources, {.peer_id = "b", .remote_indexes = indexes}, ec);
      failed += ec ? 1U : 0U;
      if (!ec) {
        channel.batched_read(targets, {.peer_id = "b", .remote_indexes = indexes}, ec);
        failed += ec ? 1U : 0U;
      }
      if (ec) {
        break;
      }
    }
    done = true;
    scribbler.join();
    process.kill();
  }
  EXPECT_GT(failed, 0U) << "nothing was scribbled where it mattered";
}

/// A peer that is killed while it answers, and that can't be connected to anew.
TEST(ChannelsOverRings, FindTheEndOfAPeerThatIsKilled) {
  constexpr std::size_t page = 4096;
  std::vector<std::byte> memory(page);
  ShmOptions options;
  options.log_sink = [](const LogRecord&) {};
  options.regions = {{memory.data(), memory.size(), page}};
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    ShmTransferChannel channel(options);
    while (const auto url = line.read_line(long_enough)) {
      channel.lazy_init_peer_connection("mortal", "a", *url);
      line.write_line("connected");
    }
    return;
  }
  for (const PollPolicy& poll : {PollPolicy::never(), PollPolicy{}, PollPolicy::always()}) {
    PeerProcess process(long_enough);
    options.poll = poll;
    options.peer_init_url = "tcp://127.0.0.1:0";
    ShmTransferChannel channel(options);
    ASSERT_EQ(process.ask(channel.peer_init_url()), "connected");
    const std::vector<std::uint64_t> index{0};
    std::error_code ec;
    std::optional<std::thread> killer;
    const auto until = std::chrono::steady_clock::now() + long_enough;
    for (int writes = 0; !ec && std::chrono::steady_clock::now() < until; ++writes) {
      channel.batched_write({ConstBuffer(memory.data(), page)}, {.peer_id = "mortal", .remote_indexes = index, .timeout = long_enough},
                            ec);
      if (writes == 100) {
        killer.emplace([&] { process.kill(); });
      }
    }
    EXPECT_EQ(ec, condition::peer_failed) << ec.message();
    if (killer) {
      killer->join();
    }
  }
}

}  // namespace
}  // namespace rings
}  // namespace kvferry::shm::testing
