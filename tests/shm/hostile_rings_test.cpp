// SPDX-License-Identifier: Apache-2.0
// Peers that say of a connection's rings what isn't so, and whose rings are scribbled over.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
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
#include <memory>
#include <optional>
#include <random>
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
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/patience.hpp"
#include "shm/handed_files.hpp"
#include "shm/meetings.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace hostile_rings {
namespace {

using kvferry::testing::PeerProcess;

using kvferry_test::long_enough;
constexpr std::size_t whole = RingFile::ring_bytes;

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
      const iovec piece{&probe, sizeof(probe)};
      ASSERT_EQ(rings.send({&piece, 1}), ssize_t{sizeof(probe)});
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
  EXPECT_EQ(ended.get(), errc::protocol_violation);
  EXPECT_EQ(why_.find("closed"), std::string::npos) << why_;
}

TEST_F(RingsOfStrangers, AreDoneWithoutWhereThereIsNoDescriptorForThemAndThatIsSaid) {
  socket_ = connect_to(endpoint_.name);
  say(socket_, hello());
  Greeting answer;
  receive(answer);
  Descriptor file;
  ASSERT_EQ(RingFile::make(own_, file), 0);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit none = before;
  none.rlim_cur = 0;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  pass(file);
  auto ended = ended_.get_future();
  const auto waited = ended.wait_for(limit);
  ::setrlimit(RLIMIT_NOFILE, &before);
  ASSERT_EQ(waited, std::future_status::ready);
  ASSERT_TRUE(link_) << why_;
  EXPECT_NE(link_->path().find("no room for the descriptor"), std::string::npos) << link_->path();
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

/// The peer is an honest process, whose memory this one writes to behind its back. That process may end in any way.
TEST(ScribbledRings, EndOperationsAndNotThisProcess) {
  constexpr std::size_t page = 4096;
  constexpr std::size_t pages = 64;
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    std::vector<std::byte> memory(pages * page);
    ShmOptions options = kvferry_test::patient(ShmOptions());
    options.process_memory = false;
    options.regions = {{memory.data(), memory.size(), page}};
    options.peer_init_url = kvferry::testing::own_loopback_url();
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
    ShmOptions options = kvferry_test::patient(ShmOptions());
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
            word ? (random() % 4) * 128 : RingFile::words_bytes + random() % (whole / sizeof(value)) * sizeof(value);
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

}  // namespace
}  // namespace hostile_rings
}  // namespace kvferry::shm::testing
