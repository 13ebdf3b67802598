// SPDX-License-Identifier: Apache-2.0
// Checksums between two channels. Nobody can change bytes between these adapters; so they are changed in memory, before they
// are compared.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <atomic>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>

#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// Changes a byte all the time.
class ChangingByte {
 public:
  explicit ChangingByte(std::byte& byte)
      : thread_([this, &byte] {
          auto* const changing = reinterpret_cast<unsigned char*>(&byte);
          while (!stopped_) {
            const std::atomic_ref<unsigned char> value(*changing);
            value.store(static_cast<unsigned char>(value.load() + 1));
          }
        }) {}
  ChangingByte(const ChangingByte&) = delete;
  ChangingByte& operator=(const ChangingByte&) = delete;
  ~ChangingByte() {
    stopped_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

/// Runs a context, until it goes.
class RunningContext {
 public:
  explicit RunningContext(asio::io_context& context) : context_(context), thread_([&context] { context.run(); }) {}
  RunningContext(const RunningContext&) = delete;
  RunningContext& operator=(const RunningContext&) = delete;
  ~RunningContext() {
    context_.stop();
    thread_.join();
    context_.restart();
  }

 private:
  asio::io_context& context_;
  std::thread thread_;
};

NodeOptions checking(std::size_t rails) {
  NodeOptions options;
  options.rails = rails;
  options.channel.checksums = true;
  options.channel.stripe_threshold = 2 * page_size;
  return options;
}

TEST(RdmaChecksums, ABatchIntoRegionsThatShareMemoryGoesOverOneRail) {
  constexpr std::size_t count = 8;
  const Node a(count, checking(2));
  const Node b(count, checking(2));
  const std::uint32_t twin = b.channel->add_region({b.region.data(), b.region.size(), page_size});
  a.fill(1);
  a.connect("a", "b", b);
  const auto write = [&](std::size_t shift) {
    std::vector<RemoteRange> ranges;
    for (std::size_t i = 0; i < count; ++i) {
      ranges.push_back(RemoteRange::contiguous(i < count / 2 ? 0 : twin, (i * shift % count) * page_size, page_size));
    }
    std::vector<std::uint64_t> before;
    for (const RdmaRailInfo& rail : a.channel->rails()) {
      before.push_back(rail.bytes_written);
    }
    EXPECT_EQ(a.channel->batched_write(a.pages(count), {.peer_id = "b", .remote_ranges = ranges}), count);
    std::size_t used = 0;
    for (std::size_t i = 0; i < before.size(); ++i) {
      used += a.channel->rails()[i].bytes_written - before[i] > page_size ? 1U : 0U;
    }
    return used;
  };
  EXPECT_EQ(write(1), 2U) << "regions that share memory, at places that don't overlap";
  EXPECT_TRUE(same(a, b));
  EXPECT_EQ(write(2), 1U) << "the second half over the first";
}

TEST(RdmaChecksums, AWriteThatIsChangedBeforeItIsComparedFailsAndIsToldToNobody) {
  constexpr std::size_t count = 8;
  for (const std::size_t rails : {1U, 2U}) {
    SCOPED_TRACE(std::to_string(rails) + " rails");
    Node a(count, checking(rails));
    Node b(count, checking(rails));
    a.fill(1);
    a.connect("a", "b", b);
    const auto all = indexes(count);
    const std::vector<std::byte> note(4, std::byte{1});
    std::uint64_t failures = 0;
    std::uint64_t successes = 0;
    {
      const ChangingByte changing(b.region[2 * page_size + 1000]);
      ASSERT_TRUE(eventually([&] {
        std::vector<std::error_code> statuses(count);
        std::string diagnostic;
        std::error_code ec;
        const std::size_t written = a.channel->batched_write(a.pages(count),
                                                             {.peer_id = "b",
                                                              .remote_indexes = all,
                                                              .notification = note,
                                                              .statuses = statuses,
                                                              .diagnostic = &diagnostic},
                                                             ec);
        if (!ec) {
          ++successes;
          return false;
        }
        ++failures;
        EXPECT_EQ(ec, errc::checksum_mismatch) << ec.message();
        EXPECT_EQ(written, count - 1);
        for (std::size_t i = 0; i < count; ++i) {
          EXPECT_EQ(statuses[i], i == 2 ? std::error_code(errc::checksum_mismatch) : std::error_code()) << i;
        }
        EXPECT_NE(diagnostic.find("object 2 "), std::string::npos) << diagnostic;
        return true;
      }));
    }
    EXPECT_EQ(b.channel->stats().checksum_mismatches, failures);
    EXPECT_EQ(b.channel->stats().pending_notifications, successes);
    EXPECT_EQ(a.channel->batched_write(a.pages(count), {.peer_id = "b", .remote_indexes = all, .notification = note}),
              count);
    EXPECT_TRUE(same(a, b));
    EXPECT_EQ(b.channel->stats().pending_notifications, successes + 1);
  }
}

TEST(RdmaChecksums, AReadOfBytesThatChangeFails) {
  constexpr std::size_t count = 8;
  Node a(count, checking(2));
  Node b(count, checking(2));
  b.fill(1);
  a.connect("a", "b", b);
  const auto all = indexes(count);
  {
    const ChangingByte changing(b.region[2 * page_size + 1000]);
    ASSERT_TRUE(eventually([&] {
      std::vector<std::error_code> statuses(count);
      std::error_code ec;
      const std::size_t read =
          a.channel->batched_read(a.pages(count), {.peer_id = "b", .remote_indexes = all, .statuses = statuses}, ec);
      if (!ec) {
        return false;
      }
      EXPECT_EQ(ec, errc::checksum_mismatch) << ec.message();
      EXPECT_EQ(read, count - 1);
      EXPECT_EQ(statuses[2], errc::checksum_mismatch);
      return true;
    }));
  }
  EXPECT_EQ(a.channel->stats().checksum_mismatches, 1U);
  EXPECT_EQ(b.channel->stats().checksum_mismatches, 0U);
  EXPECT_EQ(a.channel->batched_read(a.pages(count), {.peer_id = "b", .remote_indexes = all}), count);
  EXPECT_TRUE(same(a, b));
}

TEST(RdmaChecksums, BatchesOfManyObjectsGoThrough) {
  constexpr std::size_t count = 100'000;
  constexpr std::size_t size = 48;
  constexpr std::size_t node_pages = count * size / page_size + 1;
  Node a(node_pages, checking(2));
  Node b(node_pages, checking(2));
  a.fill(1);
  a.connect("a", "b", b);
  std::vector<MutableBuffer> objects;
  std::vector<RemoteRange> ranges;
  for (std::size_t i = 0; i < count; ++i) {
    objects.push_back(a.region.subspan(i * size, size));
    ranges.push_back(RemoteRange::contiguous(0, i * size, size));
  }
  EXPECT_EQ(a.channel->batched_write(objects, {.peer_id = "b", .remote_ranges = ranges}), count);
  EXPECT_TRUE(std::ranges::equal(a.region.first(count * size), b.region.first(count * size)));
  b.fill(2);
  EXPECT_EQ(a.channel->batched_read(objects, {.peer_id = "b", .remote_ranges = ranges}), count);
  EXPECT_TRUE(std::ranges::equal(a.region.first(count * size), b.region.first(count * size)));
}

TEST(RdmaChecksums, ACallersThreadTakesNoneAndTheReactorsAFewAtATime) {
  constexpr std::size_t size = std::size_t{8} << 20;  // what is with the adapter at a time, and posted by the call
  asio::io_context context;
  const auto guard = asio::make_work_guard(context);
  NodeOptions options = checking(1);
  options.channel.executor = context.get_executor();
  Node b(size / page_size, checking(1));
  Node a(size / page_size, std::move(options));
  a.fill(1);
  {
    const RunningContext running(context);
    a.connect("a", "b", b);
  }
  const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 0, size)};
  bool ended = false;
  std::error_code cause;
  a.channel->async_batched_write({a.region}, {.peer_id = "b", .remote_ranges = ranges},
                                 [&](std::error_code ec, std::size_t) {
                                   ended = true;
                                   cause = ec;
                                 });
  const auto landed = [&] {
    const std::atomic_ref<unsigned char> last(reinterpret_cast<unsigned char&>(b.region.back()));
    return last.load() == static_cast<unsigned char>(a.region.back());
  };
  EXPECT_TRUE(eventually(landed));
  a.region.front() ^= std::byte{1};  // before anybody but the call could have looked at it
  std::size_t turns = 0;
  while (!ended && turns < 100'000 && context.run_one_for(long_enough) != 0) {
    ++turns;
  }
  EXPECT_EQ(cause, errc::checksum_mismatch) << cause.message();
  EXPECT_GE(turns, size >> 20) << "each leaves others their turn after a mebibyte";
  const RunningContext running(context);
  a.channel->close();
}

TEST(RdmaChecksums, AForkedChildThatClosedAllFilesWritesToNoneOfItsOwn) {
  Node a(4, checking(1));
  Node b(4, checking(1));
  a.connect("a", "b", b);
  ASSERT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    int result = 2;
    try {
      // As a daemon does. Then its own file is wherever its parent had one.
      constexpr int descriptors = 200;
      for (int descriptor = 3; descriptor < descriptors; ++descriptor) {
        ::close(descriptor);
      }
      const int file = ::memfd_create("file", 0);
      for (int copy = file; copy >= 0 && copy < descriptors - 1;) {
        copy = ::dup(file);
      }
      Node own(4, checking(1));
      Node peer(4, checking(1));
      own.fill(1);
      own.connect("own", "peer", peer);
      const bool written =
          own.channel->batched_write(own.pages(4), {.peer_id = "peer", .remote_indexes = indexes(4)}) == 4;
      struct stat state = {};
      result = written && ::fstat(file, &state) == 0 && state.st_size == 0 ? 0 : 1;
    } catch (const std::exception&) {
      result = 3;
    }
    ::_exit(result);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
}

TEST(RdmaChecksums, APeerThatDoesntOfferThemIsRefusedThem) {
  NodeOptions options;
  options.told = [](Endpoint& endpoint) { endpoint.checks.reset(); };
  Node without(4, std::move(options));
  Node node(4, checking(1));
  node.connect("node", "without", without);
  std::error_code ec;
  node.channel->batched_write(node.pages(1), {.peer_id = "without", .remote_indexes = indexes(1)}, ec);
  EXPECT_EQ(ec, errc::not_supported) << ec.message();
  EXPECT_EQ(node.channel->batched_write(node.pages(1),
                                        {.peer_id = "without", .remote_indexes = indexes(1), .checksums = false}),
            1U);
}

TEST(RdmaChecksums, MemoryThatNobodyMayTouchIsAnError) {
  // The adapter goes on writing to what is registered, whatever becomes of the mapping; the CPU would end the process.
  void* const memory = ::mmap(nullptr, 4 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  {
    Node node(4, checking(1));
    Node other(4);
    const auto number =
        other.channel->add_region({static_cast<std::byte*>(memory), 4 * page_size, page_size, Access::read_write});
    node.connect("node", "other", other);
    ASSERT_EQ(::mprotect(memory, 4 * page_size, PROT_NONE), 0);
    std::error_code ec;
    node.channel->batched_write(node.pages(1),
                                {.peer_id = "other", .remote_indexes = indexes(1), .remote_region = number}, ec);
    EXPECT_EQ(ec, errc::memory_fault) << ec.message();
    EXPECT_EQ(node.channel->batched_write(node.pages(1), {.peer_id = "other", .remote_indexes = indexes(1)}), 1U);
  }
  ::munmap(memory, 4 * page_size);
}

}  // namespace
}  // namespace kvferry::rdma::testing
