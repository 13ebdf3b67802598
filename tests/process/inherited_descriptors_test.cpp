// SPDX-License-Identifier: Apache-2.0
// A program that is started while channels are open gets none of their descriptors.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <thread>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include "common/lasting_port.hpp"
#include "common/open_descriptors.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry_test::open_descriptors;

class InheritedDescriptors : public ::testing::Test {
 protected:
  /// Checks what was opened since the test began.
  void expect_close_on_exec(const std::string& when) {
    std::size_t opened = 0;
    for (const auto& [descriptor, what] : open_descriptors()) {
      const int flags = ::fcntl(descriptor, F_GETFD);
      if (flags != -1 && before_.count(descriptor) == 0) {
        ++opened;
        EXPECT_TRUE((flags & FD_CLOEXEC) != 0) << when << ": descriptor " << descriptor << ", " << what;
      }
    }
    EXPECT_GT(opened, 0U) << when;
  }

  /// The descriptors of a program that is started now, without those that it would have had when the test began.
  std::string inherited() {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    std::array<char*, 4> arguments{const_cast<char*>("sh"), const_cast<char*>("-c"),
                                   const_cast<char*>("readlink /proc/$$/fd/*"), nullptr};
    pid_t child = 0;
    EXPECT_EQ(::posix_spawnp(&child, "sh", &actions, nullptr, arguments.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    std::string listed;
    std::array<char, 4096> text{};
    for (ssize_t size = 0; (size = ::read(ends[0], text.data(), text.size())) > 0;) {
      listed.append(text.data(), static_cast<std::size_t>(size));
    }
    ::close(ends[0]);
    EXPECT_EQ(::waitpid(child, nullptr, 0), child);
    std::multiset<std::string> had;
    for (const auto& [descriptor, what] : before_) {
      had.insert(what);
    }
    std::string beyond;
    std::size_t begin = 0;
    for (std::size_t end = 0; (end = listed.find('\n', begin)) != std::string::npos; begin = end + 1) {
      const std::string what = listed.substr(begin, end - begin);
      const auto known = had.find(what);
      if (known != had.end()) {
        had.erase(known);
      } else if (what.rfind("socket:", 0) == 0 || what.rfind("anon_inode:", 0) == 0) {
        beyond += what + "\n";
      }
    }
    return beyond;
  }

  const std::map<int, std::string> before_ = open_descriptors();
};

TEST_F(InheritedDescriptors, NoneOfChannelsInAnyState) {
  TcpOptions options;
  options.lanes_per_peer = 2;
  options.io_threads = 2;
  Node decode(4, options);
  expect_close_on_exec("listening");

  Node prefill(4, options);
  prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
  expect_close_on_exec("connected");

  // A handshake that nobody answers, a name to be looked up, a recv that waits on its caller's thread, and a data
  // connection that says nothing.
  Node single(4);
  single.channel->lazy_init_peer_connection("single", "decode", decode.channel->peer_init_url());
  Node silent(4);  // its data port says nothing to a handshake
  InitSpec while_looking;
  while_looking.timeout = long_enough;
  const auto nobody = "tcp://127.0.0.1:" + std::to_string(silent.channel->data_port());
  auto unanswered = prefill.channel->async_lazy_init_peer_connection("prefill", "nobody", nobody, {}, while_looking,
                                                                     asio::use_future);
  auto named =
      prefill.channel->async_send_init_side_msg("tcp://localhost:" + nobody.substr(nobody.rfind(':') + 1),
                                                encode_side_message(P2PInitSideMsg{}), while_looking, asio::use_future);
  std::thread waiting([&] {
    std::error_code ec;
    single.channel->batched_recv({single.page(0)}, {.peer_id = "decode", .tag = 7, .timeout = long_enough}, ec);
  });
  asio::io_context io;
  asio::ip::tcp::socket stranger(io);
  stranger.connect({asio::ip::address_v4::loopback(), decode.channel->data_port()});
  ::fcntl(stranger.native_handle(), F_SETFD, FD_CLOEXEC);
  const auto deadline = std::chrono::steady_clock::now() + long_enough;
  while (single.channel->stats().of(TransferKind::recv).in_flight() == 0 &&
         std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  expect_close_on_exec("waiting");
  EXPECT_EQ(inherited(), "");

  decode.channel->batched_send({decode.page(0)}, {.peer_id = "single", .tag = 7, .timeout = long_enough});
  waiting.join();
  prefill.channel->close();
  EXPECT_TRUE(unanswered.wait_for(long_enough) == std::future_status::ready);
  EXPECT_TRUE(named.wait_for(long_enough) == std::future_status::ready);
}

TEST_F(InheritedDescriptors, AServerRestartsWhileAProgramThatItStartedRuns) {
  TcpOptions options;
  options.peer_init_url = kvferry_test::lasting_url();
  do {
    options.data_port = kvferry_test::lasting_port();
  } while (options.data_port == parse_url(options.peer_init_url).port);
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  pid_t child = 0;
  {
    Node decode(4, options);
    Node prefill(4);
    prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[0], STDIN_FILENO);
    std::array<char*, 2> arguments{const_cast<char*>("cat"), nullptr};
    ASSERT_EQ(::posix_spawnp(&child, "cat", &actions, nullptr, arguments.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
  }
  EXPECT_NO_THROW(Node(4, options));
  ::close(ends[1]);  // which ends it
  ::close(ends[0]);
  EXPECT_EQ(::waitpid(child, nullptr, 0), child);
}

}  // namespace
}  // namespace kvferry::tcp::testing
