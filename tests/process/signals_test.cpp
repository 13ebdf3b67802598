// SPDX-License-Identifier: Apache-2.0
// A program's signals: they interrupt no call of the library's, and its threads take none.
#include <dirent.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <thread>

#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;

std::vector<pid_t> threads() {
  std::vector<pid_t> all;
  DIR* const tasks = ::opendir("/proc/self/task");
  while (const dirent* const entry = ::readdir(tasks)) {
    if (const int number = std::atoi(entry->d_name); number > 0) {
      all.push_back(number);
    }
  }
  ::closedir(tasks);
  return all;
}

std::string line_of(pid_t thread, const std::string& file, const std::string& prefix) {
  std::ifstream lines("/proc/self/task/" + std::to_string(thread) + "/" + file);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(prefix, 0) == 0) {
      return line.substr(prefix.size());
    }
  }
  return {};
}

bool blocks(pid_t thread, int signal) {
  const auto mask = std::strtoull(line_of(thread, "status", "SigBlk:").c_str(), nullptr, 16);
  return (mask >> (signal - 1) & 1) != 0;
}

void ignore_it(int) {}

void handle_without_restart(int signal) {
  struct sigaction action {};
  action.sa_handler = ignore_it;
  sigaction(signal, &action, nullptr);
}

/// Makes channels and uses them in every way that sleeps, again and again.
int use_channels() {
  int failures = 0;
  for (int round = 0; round < 40; ++round) {
    try {
      TcpOptions options;
      options.poll = PollPolicy::never();
      Node decode(4, options);
      Node prefill(4, options);
      decode.fill(static_cast<unsigned>(round));
      prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
      const auto pages = indexes(4);
      const std::byte note[]{std::byte{1}};
      for (int i = 0; i < 5; ++i) {
        prefill.fill(static_cast<unsigned>(round * 100 + i));
        prefill.channel->batched_write(prefill.pages(4),
                                       {.peer_id = "decode", .remote_indexes = pages, .notification = note});
        (void)decode.channel->receive_notification(long_enough);
        const bool right = decode.memory == prefill.memory;
        failures += right ? 0 : 1;
      }
      prefill.channel->close();
      Node again(4);
    } catch (const std::exception& error) {
      ++failures;
      std::fprintf(stderr, "round %d: %s\n", round, error.what());
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace

KVFERRY_PROGRAM(signals_to_every_thread) {
  handle_without_restart(SIGUSR1);
  std::atomic<bool> stop{false};
  std::thread pelting([&] {
    const auto self = static_cast<pid_t>(::syscall(SYS_gettid));
    while (!stop) {
      for (const pid_t thread : threads()) {
        if (thread != self) {
          ::syscall(SYS_tgkill, ::getpid(), thread, SIGUSR1);
        }
      }
    }
  });
  const int result = use_channels();
  stop = true;
  pelting.join();
  return result;
}

KVFERRY_PROGRAM(a_profiler_and_a_timer) {
  handle_without_restart(SIGPROF);
  handle_without_restart(SIGALRM);
  const itimerval every_100_us{{0, 100}, {0, 100}};
  ::setitimer(ITIMER_PROF, &every_100_us, nullptr);
  ::setitimer(ITIMER_REAL, &every_100_us, nullptr);
  return use_channels();
}

namespace {

TEST(Signals, ChangeNothing) {
  for (const char* const program : {"signals_to_every_thread", "a_profiler_and_a_timer"}) {
    const auto ended = Program::run(program);
    EXPECT_TRUE(ended.right()) << program << ": " << ended.to_string();
  }
}

TEST(Signals, TheLibrarysThreadsBlockThemAndHaveNames) {
  const auto before = threads();
  const auto self = static_cast<pid_t>(::syscall(SYS_gettid));
  TcpOptions options;
  options.io_threads = 2;
  Node decode(4, options);
  Node prefill(4);
  prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());

  // A thread gives itself its name, when it first runs.
  const std::map<std::string, int> wanted{
      {"kvferry-io/0", 2}, {"kvferry-io/1", 1}, {"kvferry-zmq", 2}, {"kvferry-side", 2}, {"ZeroMQ's", 2}};
  std::map<std::string, int> names;
  const auto deadline = std::chrono::steady_clock::now() + long_enough;
  while (names != wanted && std::chrono::steady_clock::now() < deadline) {
    names.clear();
    for (const pid_t thread : threads()) {
      if (std::ranges::find(before, thread) == before.end()) {
        const std::string name = line_of(thread, "comm", "");
        ++names[name.find("ZMQ") != std::string::npos ? "ZeroMQ's" : name];
      }
    }
    std::this_thread::yield();
  }
  EXPECT_EQ(names, wanted);

  for (const pid_t thread : threads()) {
    if (std::ranges::find(before, thread) != before.end()) {
      continue;
    }
    const std::string name = line_of(thread, "comm", "");
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGCHLD, SIGUSR1, SIGUSR2, SIGPROF, SIGALRM, SIGPIPE, SIGRTMIN}) {
      EXPECT_TRUE(blocks(thread, signal)) << name << " and " << ::strsignal(signal);
    }
    // A crash goes to the program's handler, if it has one.
    EXPECT_FALSE(name.rfind("kvferry", 0) == 0 && blocks(thread, SIGSEGV)) << name;
  }
  EXPECT_FALSE(blocks(self, SIGTERM) || blocks(self, SIGINT)) << "the caller's own mask";
}

}  // namespace
}  // namespace kvferry::tcp::testing
