// SPDX-License-Identifier: Apache-2.0
// Tests of facts that the conformance suite can't know: the way of the bytes, who is turned away, and missing memory.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/shm/meeting.hpp>
#include <kvferry/shm/process_memory.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/peer_process.hpp>

#include "common/patience.hpp"
#include "common/small_stack.hpp"
#include "common/waiting_child.hpp"
#include "shm/meetings.hpp"
#include "tcp/protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::shm::testing {
namespace {

using kvferry::testing::PeerProcess;
using tcp::testing::fill;

using kvferry_test::long_enough;
constexpr std::size_t page = std::size_t{64} << 10;
constexpr std::size_t pages = 8;

/// Pages of memory, each of which can be taken away.
class Mapping {
 public:
  explicit Mapping(std::size_t size) : size_(size) {
    void* const memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::system_error(errno, std::system_category(), "mmap");
    }
    data_ = static_cast<std::byte*>(memory);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(data_, size_); }

  [[nodiscard]] std::span<std::byte> bytes() const noexcept { return {data_, size_}; }
  [[nodiscard]] MutableBuffer object(std::size_t index) const { return {data_ + index * page, page}; }
  void protect(std::size_t from, std::size_t size, int protection) const {
    EXPECT_EQ(::mprotect(data_ + from, size, protection), 0);
  }

 private:
  const std::size_t size_;
  std::byte* data_ = nullptr;
};

struct Node {
  explicit Node(ShmOptions options = {}, bool listens = true) : memory(pages * page) {
    options.regions = {{memory.bytes().data(), memory.bytes().size(), page}};
    if (listens) {
      options.peer_init_url = kvferry::testing::own_loopback_url();
    }
    channel.emplace(kvferry_test::patient(std::move(options)));
  }

  [[nodiscard]] std::string path_to(const std::string& peer) const {
    return channel->peer_info(peer).value_or(PeerInfo{}).path;
  }
  [[nodiscard]] PathStats path_stats(const std::string& name) const {
    const auto stats = channel->stats();
    const auto found = std::ranges::find(stats.paths, name, &PathStats::name);
    EXPECT_NE(found, stats.paths.end());
    return found == stats.paths.end() ? PathStats{} : *found;
  }

  Mapping memory;
  std::optional<ShmTransferChannel> channel;
};

struct Pair {
  explicit Pair(ShmOptions a_options = {}, ShmOptions b_options = {})
      : b(std::move(b_options)), a(std::move(a_options)) {
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }

  Node b;
  Node a;
};

const std::vector<std::uint64_t> all_pages{0, 1, 2, 3, 4, 5, 6, 7};

std::vector<ConstBuffer> objects_of(const Node& node) {
  std::vector<ConstBuffer> objects;
  for (const std::uint64_t index : all_pages) {
    objects.emplace_back(node.memory.object(index));
  }
  return objects;
}

TEST(ShmPath, PayloadIsReadFromThePeersMemoryAndItsHeadersGoThroughTheSocket) {
  Pair pair;
  fill(pair.a.memory.bytes(), 1);
  EXPECT_EQ(pair.a.channel->batched_write(objects_of(pair.a), {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  for (const std::string& path : {pair.a.path_to("b"), pair.b.path_to("a")}) {
    EXPECT_NE(path.find("received read by process_vm_readv, sent by process_vm_readv, headers by rings"), std::string::npos)
        << path;
  }
  EXPECT_EQ(pair.a.path_stats("process memory").bytes_out, pages * page);
  EXPECT_EQ(pair.b.path_stats("process memory").bytes_in, pages * page);
  EXPECT_LT(pair.a.path_stats("socket").bytes_out, page);

  fill(pair.b.memory.bytes(), 2);
  std::vector<MutableBuffer> targets;
  for (const std::uint64_t index : all_pages) {
    targets.push_back(pair.a.memory.object(index));
  }
  EXPECT_EQ(pair.a.channel->batched_read(targets, {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  EXPECT_EQ(pair.a.path_stats("process memory").bytes_in, pages * page);
}

TEST(ShmPath, ReadsAskNobodyWhereTheKernelLetsThem) {
  Pair pair;
  const std::vector<std::uint64_t> index{3};
  const auto read = [&](std::size_t bytes) {
    fill(pair.b.memory.bytes(), static_cast<unsigned>(bytes));
    pair.a.channel->batched_read({MutableBuffer(pair.a.memory.object(0).data(), bytes)},
                                 {.peer_id = "b", .remote_indexes = index});
    EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes().first(bytes), pair.b.memory.bytes().subspan(3 * page, bytes)));
  };
  // Behind these, the two have told each other of their regions, and have each other's answers.
  pair.b.channel->fence("a");
  pair.a.channel->fence("b");
  const std::uint64_t before = pair.b.path_stats("socket").bytes_in;
  read(page);
  read(100);
  EXPECT_EQ(pair.b.path_stats("socket").bytes_in, before);
  // With checksums, which the owner of the memory takes.
  pair.a.channel->batched_read({pair.a.memory.object(0)}, {.peer_id = "b", .remote_indexes = index, .checksums = true});
  EXPECT_GT(pair.b.path_stats("socket").bytes_in, before);
}

TEST(ShmPath, SmallPayloadGoesThroughTheSocket) {
  Pair pair;
  const std::vector<std::uint64_t> index{3};
  EXPECT_EQ(pair.a.channel->batched_write({ConstBuffer(pair.a.memory.object(0).data(), 4096)},
                                          {.peer_id = "b", .remote_indexes = index}),
            1U);
  EXPECT_EQ(pair.a.path_stats("process memory").bytes_out, 0U);
  EXPECT_GT(pair.a.path_stats("socket").bytes_out, 4096U);
}

TEST(ShmPath, WhatIsSwitchedOffIsSaidByBothSides) {
  std::mutex mutex;
  std::vector<std::string> warnings;
  ShmOptions off;
  off.process_memory = false;
  ShmOptions on;
  on.log_sink = [&](const LogRecord& record) {
    if (record.level == LogLevel::warning && record.event == "path_chosen") {
      const std::lock_guard lock(mutex);
      warnings.emplace_back(record.text);
    }
  };
  Pair pair(off, on);
  fill(pair.a.memory.bytes(), 1);
  EXPECT_EQ(pair.a.channel->batched_write(objects_of(pair.a), {.peer_id = "b", .remote_indexes = all_pages}), pages);
  EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  EXPECT_NE(pair.a.path_to("b").find("received by the rings (process_memory is off)"), std::string::npos);
  EXPECT_NE(pair.b.path_to("a").find("sent by the rings (process_memory is off)"), std::string::npos);
  EXPECT_EQ(pair.b.path_stats("process memory").bytes_in, 0U);
  const std::lock_guard lock(mutex);
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_NE(warnings.front().find("process_memory is off"), std::string::npos) << warnings.front();
}

/// A peer of another user: it may be named, and then can't read this process's memory, which the kernel forbids.
TEST(ShmUsers, AnotherUsersProcessConnectsOnlyIfItIsNamed) {
  constexpr uid_t nobody = 65534;
  if (PeerProcess::is_peer()) {
    auto line = PeerProcess::line_to_starter();
    ASSERT_EQ(::setuid(nobody), 0);
    ::prctl(PR_SET_DUMPABLE, 1);  // which the leak sanitizer needs
    ShmOptions options;
    options.allowed_users = {0};
    Node node(options, false);
    while (const auto url = line.read_line(long_enough)) {
      std::error_code ec;
      node.channel->lazy_init_peer_connection("stranger", "b", *url, {}, {}, ec);
      if (ec) {
        line.write_line("refused");
        continue;
      }
      fill(node.memory.bytes(), 5);
      const std::vector<std::byte> notification(1);
      node.channel->batched_write(objects_of(node),
                                  {.peer_id = "b", .remote_indexes = all_pages, .notification = notification}, ec);
      line.write_line(ec ? ec.message() : node.path_to("b"));
    }
    return;
  }
  if (::geteuid() != 0) {
    GTEST_SKIP() << "only root can become another user";
  }
  ShmOptions strict;
  strict.handshake_timeout = std::chrono::seconds(2);
  Node alone(strict);
  PeerProcess process(long_enough);
  EXPECT_EQ(process.ask(alone.channel->peer_init_url()), "refused");
  ShmOptions open;
  open.allowed_users = {nobody};
  Node node(open);
  const std::string path = process.ask(node.channel->peer_init_url());
  EXPECT_NE(path.find("received by the rings (the processes are of different users"), std::string::npos) << path;
  EXPECT_EQ(node.channel->receive_notification(long_enough).peer_id, "stranger");
  Mapping expected(pages * page);
  fill(expected.bytes(), 5);
  EXPECT_TRUE(std::ranges::equal(expected.bytes(), node.memory.bytes()));
  EXPECT_TRUE(process.finish());
}

TEST(ShmFaults, MemoryThatIsNotThereFailsItsOwnOperation) {
  Pair pair;
  const std::vector<std::uint64_t> index{2};
  const auto write = [&](std::size_t object) {
    std::error_code ec;
    pair.a.channel->batched_write({ConstBuffer(pair.a.memory.object(object))},
                                  {.peer_id = "b", .remote_indexes = index}, ec);
    return ec;
  };
  const auto read = [&](std::size_t object) {
    std::error_code ec;
    pair.a.channel->batched_read({pair.a.memory.object(object)}, {.peer_id = "b", .remote_indexes = index}, ec);
    return ec;
  };
  pair.a.memory.protect(1 * page + page / 2, page / 2, PROT_NONE);
  EXPECT_EQ(write(1), errc::memory_fault);
  EXPECT_EQ(read(1), errc::memory_fault);
  pair.b.memory.protect(2 * page + page / 4, 4096, PROT_NONE);
  EXPECT_EQ(write(0), errc::memory_fault);
  EXPECT_EQ(read(0), errc::memory_fault);
  pair.b.memory.protect(2 * page, page, PROT_READ | PROT_WRITE);
  EXPECT_FALSE(write(0));
  EXPECT_FALSE(read(0));
  const std::vector<PeerStats> peers = pair.a.channel->stats().peers;
  ASSERT_EQ(peers.size(), 1U);
  EXPECT_EQ(peers[0].connects, 1U) << "the connection is still the first one";
}

/// Both ends of a connection, the other of which is `pid`'s.
class Fetching : public ::testing::Test {
 protected:
  void open(pid_t pid) {
    std::array<int, 2> ends{};
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
    OpenMemory opened = open_memory(pid, ::geteuid(), reinterpret_cast<std::uintptr_t>(proof_of_memory().data()));
    ASSERT_TRUE(opened);
    socket_ = std::make_shared<UnixSocket>(ends[0], std::move(opened));
    other_.emplace(ends[1], OpenMemory());
    memory_.emplace(pid, 1, std::make_shared<MemoryTraffic>());
    memory_->begin(socket_, true, true);
  }
  tcp::PeerMemory::Fetched fetch(std::span<const std::byte> from, std::span<std::byte> to) {
    const tcp::Reference reference{reinterpret_cast<std::uintptr_t>(from.data()), from.size()};
    const iovec destination{to.data(), to.size()};
    return memory_->fetch({&reference, 1}, {&destination, 1}, ec_);
  }

  std::shared_ptr<UnixSocket> socket_;
  std::optional<UnixSocket> other_;
  std::optional<ProcessMemory> memory_;
  std::error_code ec_;
};

TEST_F(Fetching, SaysWhichSidesMemoryIsNotThere) {
  open(::getpid());
  Mapping from(2 * page);
  Mapping to(2 * page);
  fill(from.bytes(), 1);
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::all);
  EXPECT_TRUE(std::ranges::equal(from.bytes(), to.bytes()));
  from.protect(page, 4096, PROT_NONE);
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::unreadable);
  from.protect(page, 4096, PROT_READ);
  to.protect(page + 4096, 4096, PROT_READ);
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::unwritable);
}

TEST_F(Fetching, CountsNothingOfAPeerThatHangsUpBeforeItChangesItsMemory) {
  open(::getpid());
  Mapping from(page);
  Mapping to(page);
  other_->operations_end();
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::hung_up);
}

/// Its number may be another's by the next copy; somebody else may hold its end of the connection.
TEST_F(Fetching, CountsNothingOfAProcessThatHasDied) {
  Mapping from(page);
  Mapping to(page);
  kvferry_test::WaitingChild child;
  open(child.pid());
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::all);
  child.kill();
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::failed);
  EXPECT_EQ(ec_, errc::connection_lost);
}

/// Somebody else may hold its end of the connection meanwhile.
TEST_F(Fetching, CountsNothingOfAProcessThatHasBegunAnotherProgram) {
  Mapping from(page);
  Mapping to(page);
  kvferry_test::WaitingChild child([] { return ::execl("/bin/sleep", "sleep", "1000", nullptr); });
  open(child.pid());
  EXPECT_EQ(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::all);
  child.go_on();
  const auto until = std::chrono::steady_clock::now() + long_enough;
  std::string name;
  while (name != "sleep" && std::chrono::steady_clock::now() < until) {
    std::ifstream("/proc/" + std::to_string(child.pid()) + "/comm") >> name;
  }
  ASSERT_EQ(name, "sleep");
  // Anything that lies there is the new program's.
  EXPECT_NE(fetch(from.bytes(), to.bytes()), tcp::PeerMemory::Fetched::all);
  EXPECT_EQ(socket_->peer(UnixSocket::Copied::in_place), UnixSocket::Peer::dead);
}

TEST(ShmSockets, DiscardAllThatIsAskedFor) {
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()), 0);
  UnixSocket receiver(ends[0], OpenMemory());
  UnixSocket sender(ends[1], OpenMemory());
  const std::vector<std::byte> bytes(50'000);
  ASSERT_EQ(::send(ends[1], bytes.data(), bytes.size(), MSG_DONTWAIT), ssize_t{50'000});
  EXPECT_EQ(receiver.discard(40'000), 40'000);
  EXPECT_EQ(receiver.discard(40'000), 10'000);
  EXPECT_EQ(receiver.discard(1), -1);
}

/// A peer that says senseless things of references.
class HostileReferences : public Fetching {
 protected:
  HostileReferences()
      : target_(page),
        host_(std::make_shared<tcp::testing::Host>(std::vector<MemoryRegion>{{target_.bytes().data(), page, page}})) {}

  [[nodiscard]] std::error_code receive(const tcp::FrameHeader& header, const std::vector<tcp::Reference>& references,
                                        bool may_refer = true) {
    open(::getpid());
    memory_->begin(socket_, may_refer, may_refer);
    tcp::LaneProtocol protocol(host_, tcp::ReadAhead::unprotected(tcp::FrameReader::read_ahead),
                               std::shared_ptr<tcp::PeerMemory>(std::shared_ptr<void>(), &*memory_));
    const tcp::Descriptor descriptor{0, header.payload_bytes};
    std::vector<std::byte> bytes(sizeof(header) + sizeof(descriptor));
    std::memcpy(bytes.data(), &header, sizeof(header));
    std::memcpy(bytes.data() + sizeof(header), &descriptor, sizeof(descriptor));
    const auto referring = std::as_bytes(std::span(references));
    bytes.insert(bytes.end(), referring.begin(), referring.end());
    bytes.resize(bytes.size() + sizeof(tcp::FrameTrailer));
    std::span<const std::byte> left = bytes;
    std::array<iovec, 8> pieces;
    while (!left.empty()) {
      const std::size_t count = protocol.reader().prepare(pieces, left.size());
      std::size_t taken = 0;
      for (std::size_t i = 0; i < count && taken < left.size(); ++i) {
        const std::size_t part = std::min(pieces[i].iov_len, left.size() - taken);
        std::memcpy(pieces[i].iov_base, left.data() + taken, part);
        taken += part;
      }
      taken = count == 0 ? std::min(left.size(), protocol.reader().discardable()) : taken;
      if (const auto ec = protocol.received(taken)) {
        return ec;
      }
      left = left.subspan(taken);
    }
    return {};
  }

  [[nodiscard]] static tcp::FrameHeader write(std::uint64_t bytes, std::size_t references) {
    tcp::FrameHeader header;
    header.type = tcp::FrameType::write;
    header.operation = 1;
    header.count = 1;
    header.payload_bytes = bytes;
    header.references = static_cast<std::uint32_t>(references);
    return header;
  }

  Mapping target_;
  std::shared_ptr<tcp::testing::Host> host_;
};

TEST_F(HostileReferences, AreMeasuredAgainstThePayload) {
  std::vector<std::byte> source(4096, std::byte{7});
  const tcp::Reference good{reinterpret_cast<std::uintptr_t>(source.data()), source.size()};
  EXPECT_FALSE(receive(write(4096, 1), {good}));
  EXPECT_EQ(target_.bytes()[4095], std::byte{7});
  EXPECT_EQ(receive(write(4096, 1), {good}, false), errc::protocol_violation) << "nobody said that it may";
  EXPECT_EQ(receive(write(4095, 1), {good}), errc::protocol_violation) << "more than the payload";
  EXPECT_EQ(receive(write(4097, 1), {good}), errc::protocol_violation) << "less than the payload";
  EXPECT_EQ(receive(write(4096, 2), {good, {good.address, 0}}), errc::protocol_violation) << "nothing";
  EXPECT_EQ(receive(write(4096, 2), {{good.address, ~std::uint64_t{0}}, {good.address, 4097}}),
            errc::protocol_violation)
      << "a sum that overflows";
  EXPECT_EQ(receive(write(4096, tcp::max_references + 1), {}), errc::protocol_violation);
  auto read = write(4096, 1);
  read.type = tcp::FrameType::read;
  EXPECT_EQ(receive(read, {good}), errc::protocol_violation) << "a read has no payload";
}

TEST_F(Meetings, StrangersAtTheSocketDoNotKeepThePeerOut) {
  std::vector<Descriptor> silent;
  for (int i = 0; i < 20; ++i) {
    silent.push_back(connect_to(endpoint_.name));
  }
  const Descriptor liar = connect_to(endpoint_.name);
  auto wrong = hello();
  wrong.secret[0] ^= std::byte{1};
  say(liar, wrong);
  const Descriptor peer = connect_to(endpoint_.name);
  say(peer, hello());
  Greeting answer;
  ASSERT_TRUE(kvferry::testing::wait_readable(peer.get(), long_enough));
  ASSERT_EQ(::recv(peer.get(), &answer, sizeof(answer), MSG_WAITALL), ssize_t{sizeof(answer)});
  EXPECT_EQ(answer.magic, Greeting::accepting);
  EXPECT_TRUE(std::ranges::equal(answer.secret, endpoint_.accept_secret));
  EXPECT_EQ(answer.reach.value, Reach::other_process) << "there is no proof at address 0";
  auto settled = hello();
  settled.magic = Greeting::settled;
  say(peer, settled);
  auto ended = ended_.get_future();
  ASSERT_EQ(ended.wait_for(long_enough), std::future_status::ready);
  EXPECT_FALSE(ended.get());
  ASSERT_NE(link_, nullptr);
  EXPECT_NE(link_->path().find("received by the socket"), std::string::npos) << link_->path();
  // It took no ring, as peers do that know of none.
  EXPECT_NE(link_->path().find("headers by the socket (no rings: the peer uses none)"), std::string::npos) << link_->path();
  EXPECT_FALSE(options_->refusals->snapshot().empty());
  // The silent ones have been let go, though their own ends are still open.
  for (const Descriptor& one : silent) {
    char byte = 0;
    ASSERT_TRUE(kvferry::testing::wait_readable(one.get(), long_enough));
    EXPECT_LE(::recv(one.get(), &byte, 1, MSG_DONTWAIT), 0);
  }
}

TEST(ShmCalls, FitASmallStack) {
  kvferry_test::on_small_stack([] {
    Pair pair;
    fill(pair.a.memory.bytes(), 9);
    const TransferSpec to_all{.peer_id = "b", .remote_indexes = all_pages, .checksums = true};
    EXPECT_EQ(pair.a.channel->batched_write(objects_of(pair.a), to_all), pages);
    std::vector<MutableBuffer> targets;
    for (const std::uint64_t index : all_pages) {
      targets.push_back(pair.a.memory.object(index));
    }
    EXPECT_EQ(pair.a.channel->batched_read(targets, {.peer_id = "b", .remote_indexes = all_pages}), pages);
    EXPECT_TRUE(std::ranges::equal(pair.a.memory.bytes(), pair.b.memory.bytes()));
  });
}

}  // namespace
}  // namespace kvferry::shm::testing
