// SPDX-License-Identifier: Apache-2.0
// Channels at the end of a process: in static objects, never destroyed, or in use while it ends.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <latch>
#include <memory>
#include <new>
#include <string_view>
#include <thread>

#include <kvferry/side_message_codec.hpp>

#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;

/// Two connected channels; `prefill` writes to `decode`, which it knows as "decode".
struct StaticPair {
  explicit StaticPair(TcpOptions options = {}) {
    options.poll = PollPolicy::never();  // a call that waits sleeps
    decode.emplace(4, options);
    prefill.emplace(4, options);
    prefill->channel->lazy_init_peer_connection("prefill", "decode", decode->channel->peer_init_url());
  }

  void write() {
    const auto pages = indexes(1);
    prefill->channel->batched_write({prefill->page(0)}, {.peer_id = "decode", .remote_indexes = pages});
  }

  std::optional<Node> decode;
  std::optional<Node> prefill;
};

/// Ends the program with another exit code if something is wrong where nothing can be thrown any more.
void require(bool right, const char* what) {
  if (!right) {
    std::fprintf(stderr, "wrong: %s\n", what);
    std::_Exit(1);
  }
}

void require_working_errors(TcpTransferChannel& channel) {
  std::error_code ec;
  channel.batched_write({ConstBuffer()}, {.peer_id = "nobody"}, ec);
  require(ec == condition::invalid_argument, "the condition of an error of kvferry's");
  require(!ec.message().empty() && std::string(ec.category().name()) == "kvferry", "what it says of itself");
  channel.lazy_init_peer_connection("a", "nobody", "tcp://127.0.0.1:1", {}, {.timeout = std::chrono::milliseconds(50)},
                                    ec);
  require(ec == condition::retryable && !ec.message().empty(), "the condition of one of the network's");
}

/// Destroyed after main, used before that.
struct AfterMain {
  ~AfterMain() {
    if (pair == nullptr) {
      return;
    }
    pair->write();
    require_working_errors(*pair->prefill->channel);
    pair.reset();
  }

  std::unique_ptr<StaticPair> pair;
};

AfterMain after_main;

}  // namespace

KVFERRY_PROGRAM(channel_in_a_static_object) {
  after_main.pair = std::make_unique<StaticPair>();
  after_main.pair->write();
  return 0;
}

/// Where nobody has used OpenSSL before (docs/guide.md).
KVFERRY_PROGRAM(encrypted_channel_in_a_static_object) {
  TcpOptions options;
  options.keyring = group_keyring();
  after_main.pair = std::make_unique<StaticPair>(options);
  after_main.pair->write();
  require(after_main.pair->prefill->channel->peer_info("decode")->path.find("TLS") != std::string::npos, "the path");
  return 0;
}

KVFERRY_PROGRAM(channel_that_is_never_destroyed) {
  alignas(StaticPair) static std::array<std::byte, sizeof(StaticPair)> storage;
  StaticPair* const pair = new (storage.data()) StaticPair;
  static const auto pages = indexes(1);
  for (int i = 0; i < 1000; ++i) {
    // No future: its handler runs on Asio's system executor, which is gone after main.
    pair->prefill->channel->async_batched_write({pair->prefill->page(0)},
                                                {.peer_id = "decode", .remote_indexes = pages},
                                                [](std::error_code, std::size_t) {});
  }
  return 0;  // with most of them on their way
}

namespace {

/// Threads call until the destructor, after main, closes the channel.
struct Callers {
  ~Callers() {
    if (pair != nullptr) {
      pair->prefill->channel->close();
      for (std::thread& thread : threads) {
        thread.join();
      }
    }
  }

  void call() {
    std::error_code ec;
    const auto pages = indexes(1);
    while (!ec) {
      ++calls;
      pair->prefill->channel->batched_write({pair->prefill->page(0)}, {.peer_id = "decode", .remote_indexes = pages},
                                            ec);
    }
    require(ec == errc::closed, "the end of a call whose channel is closed");
  }

  std::unique_ptr<StaticPair> pair;
  std::vector<std::thread> threads;
  std::atomic<int> calls{0};
};

Callers callers;

}  // namespace

KVFERRY_PROGRAM(exit_while_threads_call) {
  TcpOptions options;
  options.drain_timeout = long_enough;  // else a peer that is slow to answer leaves a call in doubt
  callers.pair = std::make_unique<StaticPair>(options);
  for (int i = 0; i < 2; ++i) {
    callers.threads.emplace_back([] { callers.call(); });
  }
  while (callers.calls < 100) {
    std::this_thread::yield();
  }
  std::exit(0);
}

namespace {

/// Sends in its destructor to a recv that comes later, so that the caller sleeps; the process' own files stay as they are.
struct SaysGoodbye {
  ~SaysGoodbye() {
    if (pair == nullptr) {
      return;
    }
    std::array<int, 8> files{};
    for (int& file : files) {
      file = ::open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
      require(file >= 0, "a file");
    }
    for (std::uint64_t tag = 0; tag < 20; ++tag) {
      send(tag);
    }
    for (const int file : files) {
      struct stat info {};
      require(::fstat(file, &info) == 0, "the file is still this program's");
      require(info.st_size == 0, "nobody wrote into the program's file");
      ::close(file);
    }
  }

  void send(std::uint64_t tag) {
    std::thread receiver([this, tag] {
      const auto& stats = *pair->prefill->channel;
      while (stats.stats().of(TransferKind::send).in_flight() == 0) {
        std::this_thread::yield();
      }
      pair->decode->channel->batched_recv({pair->decode->page(0)}, {.peer_id = "prefill", .tag = tag});
    });
    std::error_code ec;
    pair->prefill->channel->batched_send({pair->prefill->page(0)}, {.peer_id = "decode", .tag = tag}, ec);
    receiver.join();
    require(!ec, "a send in a static object's destructor");
  }

  std::unique_ptr<StaticPair> pair;
};

SaysGoodbye says_goodbye;

}  // namespace

KVFERRY_PROGRAM(blocking_calls_after_main) {
  says_goodbye.pair = std::make_unique<StaticPair>();
  says_goodbye.send(0);  // makes what a thread keeps for such calls
  return 0;
}

namespace {

/// Closed and destroyed by whichever thread calls exit.
std::unique_ptr<StaticPair> of_whoever_exits;

struct AnswersByExit final : TcpTransferChannel {
  explicit AnswersByExit(TcpOptions options) : TcpTransferChannel(std::move(options)) { answer_side_messages(); }
  ~AnswersByExit() override { close(); }
  SideMessage handle_init_side_msg(const SideMessage&) override { std::exit(0); }
};

std::unique_ptr<AnswersByExit> answers_by_exit;

}  // namespace

KVFERRY_PROGRAM(exit_in_a_handler) {
  of_whoever_exits = std::make_unique<StaticPair>();
  of_whoever_exits->write();
  static const auto pages = indexes(1);
  static std::latch no_more_calls(1);  // no other thread may use what exit destroys
  for (int i = 0; i < 100; ++i) {
    of_whoever_exits->prefill->channel->async_batched_write({of_whoever_exits->prefill->page(0)},
                                                            {.peer_id = "decode", .remote_indexes = pages},
                                                            [i](std::error_code, std::size_t) {
                                                              if (i == 50) {
                                                                no_more_calls.wait();
                                                                std::exit(0);
                                                              }
                                                            });
  }
  no_more_calls.count_down();
  std::promise<void>().get_future().wait();
  return 1;
}

KVFERRY_PROGRAM(exit_in_the_answer_to_a_side_message) {
  TcpOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.hold_side_messages = true;
  answers_by_exit = std::make_unique<AnswersByExit>(options);
  TcpTransferChannel asking(TcpOptions{});
  // Ends, if it does before the process, because the channel that was asked is closed.
  std::error_code ignored;
  asking.send_init_side_msg(answers_by_exit->peer_init_url(), encode_side_message(P2PInitSideMsg{}), {}, ignored);
  std::promise<void>().get_future().wait();
  return 1;
}

KVFERRY_PROGRAM(channel_of_a_thread) {
  const auto use = [] {
    thread_local StaticPair pair;
    pair.write();
    require_working_errors(*pair.prefill->channel);
  };
  use();
  std::thread(use).join();
  return 0;
}

namespace {

/// Before any other of the program's or library's objects of static storage duration is made.
__attribute__((constructor(101))) void use_channels_before_main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "--program=channel_before_main") {
    static StaticPair* const pair = new StaticPair;  // never destroyed
    pair->write();
    require_working_errors(*pair->prefill->channel);
  }
}

}  // namespace

KVFERRY_PROGRAM(channel_before_main) { return 0; }

KVFERRY_PROGRAM(channel_without_standard_descriptors) {
  const int error_output = ::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 10);
  const auto close_standard = [] {
    for (int descriptor = 0; descriptor <= 2; ++descriptor) {
      ::close(descriptor);
    }
  };
  close_standard();
  StaticPair pair;
  for (int connection = 0; connection < 3; ++connection) {
    std::printf("what would go to a peer\n");
    std::fflush(stdout);
    std::fprintf(stderr, "and this\n");
    for (int i = 0; i < 30; ++i) {
      pair.write();
    }
    // Also where they are closed while there are channels, as by a program that becomes a daemon.
    pair.prefill->channel->disconnect("decode");
    close_standard();
    pair.write();
  }
  require_working_errors(*pair.prefill->channel);
  bool kept = true;
  for (int descriptor = 0; descriptor <= 2; ++descriptor) {
    struct stat info {};
    kept = kept && ::fstat(descriptor, &info) == 0 && S_ISCHR(info.st_mode);
  }
  ::dup2(error_output, STDERR_FILENO);
  require(kept, "the standard descriptors are no sockets");
  return 0;
}

namespace {

class AtExit : public ::testing::TestWithParam<const char*> {};

TEST_P(AtExit, TheProgramEndsWell) {
  for (int round = 0; round < 5; ++round) {
    const auto ended = Program::run(GetParam());
    ASSERT_TRUE(ended.right()) << ended.to_string();
  }
}

INSTANTIATE_TEST_SUITE_P(Programs, AtExit,
                         ::testing::Values("channel_in_a_static_object", "encrypted_channel_in_a_static_object",
                                           "channel_that_is_never_destroyed",
                                           "exit_while_threads_call", "blocking_calls_after_main", "exit_in_a_handler",
                                           "exit_in_the_answer_to_a_side_message", "channel_of_a_thread",
                                           "channel_before_main", "channel_without_standard_descriptors"),
                         [](const auto& tested) { return std::string(tested.param); });

}  // namespace
}  // namespace kvferry::tcp::testing
