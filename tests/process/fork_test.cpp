// SPDX-License-Identifier: Apache-2.0
// Forked children: their own channels work, those of their parents are inert, and the parents go on.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>

#include <kvferry/completion_queue.hpp>
#include <kvferry/side_message_codec.hpp>

#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;

struct ForkedPair {
  explicit ForkedPair(const std::string& host = "127.0.0.1") : decode(4), prefill(4) {
    const std::string url = decode.channel->peer_init_url();
    prefill.channel->lazy_init_peer_connection("prefill", "decode", "tcp://" + host + url.substr(url.rfind(':')));
  }

  /// Whether a page with new content arrives.
  [[nodiscard]] bool transfers(unsigned seed) {
    prefill.fill(seed);
    const auto pages = indexes(4);
    std::error_code ec;
    prefill.channel->batched_write(prefill.pages(4), {.peer_id = "decode", .remote_indexes = pages}, ec);
    return !ec && decode.memory == prefill.memory;
  }

  Node decode;
  Node prefill;
};

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition); \
      std::_Exit(1);                                                             \
    }                                                                            \
  } while (false)

/// Runs `body` in a forked child, which then exits, with all that happens at exit.
bool right_in_child(const std::function<void()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    body();
    std::exit(0);
  }
  const auto ended = Program::wait_for(child);
  if (!ended.right()) {
    std::fprintf(stderr, "the child: %s\n", ended.to_string().c_str());
  }
  return ended.right();
}

/// Every call on a channel that the parent made.
void require_inert(ForkedPair& parents) {
  TcpTransferChannel& channel = *parents.prefill.channel;
  const auto pages = indexes(4);
  std::vector<std::error_code> statuses(4);
  std::string diagnostic;
  std::error_code ec;
  channel.batched_write(parents.prefill.pages(4),
                        {.peer_id = "decode", .remote_indexes = pages, .statuses = statuses, .diagnostic = &diagnostic},
                        ec);
  REQUIRE(ec == errc::forked && ec == condition::invalid_argument && ec != condition::retryable);
  REQUIRE(std::ranges::all_of(statuses, [](const auto& status) { return status == errc::forked; }));
  REQUIRE(!diagnostic.empty());
  channel.batched_read(parents.prefill.pages(4), {.peer_id = "decode", .remote_indexes = pages}, ec);
  REQUIRE(ec == errc::forked);
  channel.batched_send(parents.prefill.pages(1), {.peer_id = "decode"}, ec);
  REQUIRE(ec == errc::forked);
  channel.batched_recv(parents.prefill.pages(1), {.peer_id = "decode"}, ec);
  REQUIRE(ec == errc::forked);
  (void)channel.receive_notification({}, ec);
  REQUIRE(ec == errc::forked);
  (void)channel.lazy_init_peer_connection("prefill", "decode", "tcp://127.0.0.1:1", {}, {}, ec);
  REQUIRE(ec == errc::forked);
  (void)channel.send_init_side_msg("tcp://127.0.0.1:1", encode_side_message(P2PInitSideMsg{}), {}, ec);
  REQUIRE(ec == errc::forked);
  channel.fence("decode", {}, ec);
  REQUIRE(ec == errc::forked);
  (void)channel.add_region(channel.regions()[0], ec);
  REQUIRE(ec == errc::forked);
  channel.remove_region(0, {}, ec);
  REQUIRE(ec == errc::forked);
  auto future = channel.async_batched_write(parents.prefill.pages(4), {.peer_id = "decode", .remote_indexes = pages},
                                            asio::use_future);
  REQUIRE(future.wait_for(long_enough) == std::future_status::ready);
  try {
    future.get();
    REQUIRE(false);
  } catch (const std::system_error& error) {
    REQUIRE(error.code() == errc::forked);
  }
  REQUIRE(!channel.remote_xfer_handler_exists("decode") && !channel.peer_info("decode"));
  REQUIRE(channel.stats().connected_peers == 0);
  REQUIRE(channel.regions().size() == 1 && parents.decode.channel->data_port() == 0);
  channel.close();
}

std::unique_ptr<ForkedPair> of_parent;

}  // namespace

KVFERRY_PROGRAM(children_make_channels) {
  of_parent = std::make_unique<ForkedPair>();
  REQUIRE(of_parent->transfers(1));
  of_parent.reset();
  REQUIRE(right_in_child([] { REQUIRE(ForkedPair().transfers(2)); }));
  { REQUIRE(ForkedPair("localhost").transfers(3)); }
  REQUIRE(right_in_child([] { REQUIRE(ForkedPair("localhost").transfers(4)); }));
  of_parent = std::make_unique<ForkedPair>();
  REQUIRE(right_in_child([] { REQUIRE(ForkedPair().transfers(5)); }));
  REQUIRE(right_in_child([] {
    ForkedPair own;
    REQUIRE(own.transfers(6));
    // And so does a child of the child, to which both are its parents'.
    REQUIRE(right_in_child([&] {
      require_inert(own);
      require_inert(*of_parent);
      REQUIRE(ForkedPair().transfers(7));
    }));
    REQUIRE(own.transfers(8));
  }));
  REQUIRE(of_parent->transfers(9));
  return 0;
}

KVFERRY_PROGRAM(inherited_channels_are_inert) {
  of_parent = std::make_unique<ForkedPair>();
  for (unsigned round = 0; round < 5; ++round) {
    // Once left to the end of the process, once destroyed before that.
    REQUIRE(right_in_child([] { require_inert(*of_parent); }));
    REQUIRE(of_parent->transfers(2 * round));
    REQUIRE(right_in_child([] {
      require_inert(*of_parent);
      of_parent.reset();
      REQUIRE(ForkedPair().transfers(1));
    }));
    REQUIRE(of_parent->transfers(2 * round + 1));
  }
  return 0;
}

KVFERRY_PROGRAM(fork_while_all_threads_work) {
  of_parent = std::make_unique<ForkedPair>();
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&] {
      const auto pages = indexes(4);
      while (!stop) {
        std::error_code ec;
        of_parent->prefill.channel->batched_write(of_parent->prefill.pages(4),
                                                  {.peer_id = "decode", .remote_indexes = pages}, ec);
        failures += ec ? 1 : 0;
      }
    });
  }
  threads.emplace_back([&] {
    while (!stop) {
      ForkedPair other;  // so that the process's shared things are made and destroyed, too
    }
  });
  threads.emplace_back([&] {
    TcpTransferChannel& channel = *of_parent->prefill.channel;
    const MemoryRegion offered = channel.regions()[0];
    while (!stop) {
      std::error_code ec;
      const std::uint32_t number = channel.add_region(offered, ec);
      failures += ec ? 1 : 0;
      for (int i = 0; i < 1000; ++i) {
        (void)channel.regions();  // under a mutex that is held in the child for ever
      }
      channel.remove_region(number, {}, ec);
      failures += ec ? 1 : 0;
    }
  });
  bool right = true;
  for (int round = 0; round < 20 && right; ++round) {
    right = right_in_child([&] {
      require_inert(*of_parent);
      if (round % 2 == 0) {
        of_parent.reset();
      }
      REQUIRE(ForkedPair().transfers(1));
      std::_Exit(0);  // the threads of its parent can't be joined
    });
  }
  stop = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  REQUIRE(right && failures == 0);
  REQUIRE(of_parent->transfers(2));
  return 0;
}

KVFERRY_PROGRAM(fork_elsewhere) {
  of_parent = std::make_unique<ForkedPair>();
  // In another thread.
  bool right = false;
  std::thread([&] {
    right = right_in_child([] {
      require_inert(*of_parent);
      REQUIRE(ForkedPair().transfers(1));
      std::_Exit(0);
    });
  }).join();
  REQUIRE(right);
  // In a completion handler, which returns in the child as well.
  std::promise<pid_t> forked;
  const auto pages = indexes(1);
  of_parent->prefill.channel->async_batched_write(
      of_parent->prefill.pages(1), {.peer_id = "decode", .remote_indexes = pages}, [&](std::error_code, std::size_t) {
        const pid_t child = ::fork();
        if (child != 0) {
          forked.set_value(child);
        }
      });
  const auto ended = Program::wait_for(forked.get_future().get());
  REQUIRE(ended.right());
  REQUIRE(of_parent->transfers(3));
  return 0;
}

KVFERRY_PROGRAM(completion_queues_are_inert) {
  ForkedPair pair;
  const auto pages = indexes(4);
  const auto queue = std::make_unique<CompletionQueue>();
  const auto start_write = [&](CompletionQueue& to, std::uint64_t user_data) {
    return pair.prefill.channel->async_batched_write(
        pair.prefill.pages(4), {.peer_id = "decode", .remote_indexes = pages}, to.token(user_data));
  };
  const auto readable = [&](std::chrono::milliseconds limit) {
    pollfd polled{queue->descriptor(), POLLIN, 0};
    return ::poll(&polled, 1, static_cast<int>(limit.count())) == 1;
  };
  std::array<CompletionEntry, 4> entries;
  // The parent notices nothing of the child's calls on the parent's channel.
  REQUIRE(right_in_child([&] {
    const OperationHandle handle = start_write(*queue, 1);
    REQUIRE(handle.result() && handle.result()->error == errc::forked);
    REQUIRE(queue->drain(entries) == 0);
  }));
  REQUIRE(!readable(std::chrono::milliseconds(0)));
  // Nor does it take away what the parent is told.
  const OperationHandle of_parent_handle = start_write(*queue, 2);
  REQUIRE(readable(long_enough));
  REQUIRE(right_in_child([&] {
    REQUIRE(queue->drain(entries) == 0);
    of_parent_handle.cancel();
    REQUIRE(!of_parent_handle.ended());
    queue->~CompletionQueue();
    CompletionQueue own;
    (void)start_write(own, 3);
    REQUIRE(own.drain(entries) == 1 && entries[0].error == errc::forked);
    std::_Exit(0);  // the queue would be destroyed once more
  }));
  REQUIRE(readable(std::chrono::milliseconds(0)) && queue->drain(entries) == 1);
  REQUIRE(entries[0].user_data == 2 && !entries[0].error && !readable(std::chrono::milliseconds(0)));
  // Nor does it wait for a lock that one of the parent's threads had.
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    std::array<CompletionEntry, 4> taken;
    while (!stop) {
      (void)queue->drain(taken);
    }
  });
  bool right = true;
  for (int round = 0; round < 20 && right; ++round) {
    right = right_in_child([&] {
      REQUIRE(queue->drain(entries) == 0 && start_write(*queue, 4).ended());
      std::_Exit(0);  // the thread of its parent can't be joined
    });
  }
  stop = true;
  busy.join();
  return right ? 0 : 1;
}

KVFERRY_PROGRAM(daemonize) {
  std::array<int, 2> ends{};
  REQUIRE(::pipe2(ends.data(), O_CLOEXEC) == 0);
  const pid_t starter = ::fork();
  if (starter == 0) {
    of_parent = std::make_unique<ForkedPair>();
    if (::fork() != 0) {
      std::exit(0);
    }
    ::setsid();
    require_inert(*of_parent);
    const char result = ForkedPair().transfers(1) ? 'y' : 'n';
    REQUIRE(::write(ends[1], &result, 1) == 1);
    std::exit(0);
  }
  REQUIRE(Program::wait_for(starter).right());
  ::close(ends[1]);
  char result = 0;
  REQUIRE(::read(ends[0], &result, 1) == 1 && result == 'y');
  return 0;
}

namespace {

class Fork : public ::testing::TestWithParam<const char*> {};

TEST_P(Fork, ChildrenAndParentsWork) {
  const auto ended = Program::run(GetParam());
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

std::string name_of(const ::testing::TestParamInfo<const char*>& tested) { return tested.param; }

INSTANTIATE_TEST_SUITE_P(Programs, Fork,
                         ::testing::Values("children_make_channels", "inherited_channels_are_inert", "fork_elsewhere",
                                           "completion_queues_are_inert", "daemonize"),
                         name_of);
// Not under AddressSanitizer: its allocator's locks stay locked in a child if another thread allocates during the fork.
INSTANTIATE_TEST_SUITE_P(WhileThreadsAllocate, Fork, ::testing::Values("fork_while_all_threads_work"), name_of);

}  // namespace
}  // namespace kvferry::tcp::testing
