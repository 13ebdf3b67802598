// SPDX-License-Identifier: Apache-2.0
// A process that runs out of descriptors or threads gets errors, nothing ends it, and with room again all works again.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>
#include <thread>

#include "program.hpp"
#include "tcp/channel_pair.hpp"

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KVFERRY_TEST_THREAD_LIMIT
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <memory>

namespace {

/// How many more threads may be there at a time.
std::atomic<int> threads_left{1 << 20};

struct Start {
  void* (*function)(void*);
  void* argument;
};

void* run_counted(void* given) {
  const std::unique_ptr<Start> start(static_cast<Start*>(given));
  void* const result = start->function(start->argument);
  ++threads_left;
  return result;
}

}  // namespace

/// Stands in for the C library's in the whole process, ZeroMQ included.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*function)(void*),
                              void* argument) {
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(::dlsym(RTLD_NEXT, "pthread_create"));
  auto start = std::make_unique<Start>(Start{function, argument});
  const int failed = threads_left.fetch_sub(1) > 0 ? real(thread, attributes, &run_counted, start.get()) : EAGAIN;
  if (failed != 0) {
    ++threads_left;
    return failed;
  }
  (void)start.release();
  return 0;
}
#endif

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;

/// Makes two channels, connects them by name and writes a page. @return whether it arrived; if not, `error` says why.
bool transfer_page(std::string& error, std::chrono::milliseconds timeout = std::chrono::milliseconds(300)) {
  const char* where = "the decoding channel's constructor";
  try {
    TcpOptions options;
    options.handshake_timeout = timeout;
    options.default_timeout = timeout;
    Node decode(4, options);
    where = "the prefilling channel's constructor";
    Node prefill(4, options, false);
    where = "connecting";
    const std::string url = decode.channel->peer_init_url();
    prefill.channel->lazy_init_peer_connection("prefill", "decode", "tcp://localhost" + url.substr(url.rfind(':')));
    where = "writing";
    prefill.fill(1);
    const auto pages = indexes(4);
    prefill.channel->batched_write(prefill.pages(4), {.peer_id = "decode", .remote_indexes = pages});
    error = "other bytes";
    return decode.memory == prefill.memory;
  } catch (const TransferError& failure) {
    error = std::string(where) + ": " + failure.what();
  } catch (const std::bad_alloc& failure) {
    error = std::string(where) + ": " + failure.what();
  } catch (const std::exception& failure) {
    error = std::string(where) + ": no TransferError: " + failure.what();
    std::fprintf(stderr, "%s\n", error.c_str());
    std::_Exit(1);
  }
  return false;
}

/// With enough of everything, on a machine that may be busy.
int work_afterwards() {
  std::string error;
  for (int attempt = 1; attempt <= 20; ++attempt) {
    if (transfer_page(error, attempt * std::chrono::milliseconds(300))) {
      return 0;
    }
  }
  std::fprintf(stderr, "afterwards: %s\n", error.c_str());
  return 1;
}

/// Lets the process open `more` descriptors, until it is destroyed.
class DescriptorLimit {
 public:
  explicit DescriptorLimit(int more) {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const int next = ::fcntl(0, F_DUPFD_CLOEXEC, 0);
    ::close(next);
    rlimit few = before_;
    few.rlim_cur = static_cast<rlim_t>(next + more);
    ::setrlimit(RLIMIT_NOFILE, &few);
  }
  DescriptorLimit(const DescriptorLimit&) = delete;
  DescriptorLimit& operator=(const DescriptorLimit&) = delete;
  ~DescriptorLimit() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

/// Lets the process map `more` MiB of memory, its threads' stacks included, until it is destroyed.
class AddressSpaceLimit {
 public:
  explicit AddressSpaceLimit(rlim_t more) {
    ::getrlimit(RLIMIT_AS, &before_);
    std::ifstream statm("/proc/self/statm");
    rlim_t pages = 0;
    statm >> pages;
    rlimit little = before_;
    little.rlim_cur = pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE)) + (more << 20);
    ::setrlimit(RLIMIT_AS, &little);
  }
  AddressSpaceLimit(const AddressSpaceLimit&) = delete;
  AddressSpaceLimit& operator=(const AddressSpaceLimit&) = delete;
  ~AddressSpaceLimit() { ::setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_{};
};

}  // namespace

KVFERRY_PROGRAM(little_address_space) {
  std::string error;
  {
    const AddressSpaceLimit limit(static_cast<rlim_t>(std::atoi(Program::argument().c_str())));
    (void)transfer_page(error);
  }
  std::printf("%s\n", error.c_str());
  return work_afterwards();
}

KVFERRY_PROGRAM(few_descriptors) {
  {
    const DescriptorLimit limit(std::atoi(Program::argument().c_str()));
    std::string error;
    (void)transfer_page(error);
  }
  return work_afterwards();
}

KVFERRY_PROGRAM(descriptors_used_up_later) {
  TcpOptions options;
  options.poll = PollPolicy::never();
  Node decode(4, options);
  Node prefill(4, options);
  const auto pages = indexes(4);
  const auto write = [&](std::string_view peer) {
    std::error_code ec;
    prefill.channel->batched_write(prefill.pages(4), {.peer_id = peer, .remote_indexes = pages}, ec);
    return ec;
  };
  const auto connect = [&](std::chrono::milliseconds timeout) {
    std::error_code ec;
    InitSpec spec;
    spec.timeout = timeout;
    prefill.channel->lazy_init_peer_connection("prefill again", "again", decode.channel->peer_init_url(), {}, spec, ec);
    return ec;
  };
  // The handshake's descriptors may be closed after the limit was set, and be enough for another connection: then once more.
  for (int attempt = 1;; ++attempt) {
    prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
    const DescriptorLimit none(0);
    for (int round = 0; round < 4; ++round) {
      std::error_code ec;
      std::thread([&] { ec = write("decode"); }).join();
      if (ec) {
        std::fprintf(stderr, "a write by a thread that never wrote: %s\n", ec.message().c_str());
        return 1;
      }
    }
    if (!connect(std::chrono::milliseconds(200))) {
      if (attempt == 20) {
        std::fprintf(stderr, "connected without a descriptor\n");
        return 1;
      }
      prefill.channel->disconnect("again");
      continue;
    }
    try {
      const Node other(4);
      std::fprintf(stderr, "made a channel without a descriptor\n");
      return 1;
    } catch (const TransferError& error) {
      if (error.code() != std::errc::too_many_files_open) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
      }
      break;
    }
  }
  const auto ec = connect(long_enough);
  if (ec || write("again")) {
    std::fprintf(stderr, "with descriptors again: %s\n", ec.message().c_str());
    return 1;
  }
  return 0;
}

#ifdef KVFERRY_TEST_THREAD_LIMIT
KVFERRY_PROGRAM(few_threads) {
  const int more = std::atoi(Program::argument().c_str());
  constexpr int plenty = 1000;
  threads_left = more;
  std::string error;
  (void)transfer_page(error);
  threads_left += plenty;
  return work_afterwards();
}
#endif

namespace {

TEST(Limits, OfDescriptors) {
  for (int more = 0; more <= 46; ++more) {
    const auto ended = Program::run("few_descriptors", std::to_string(more));
    EXPECT_TRUE(ended.right()) << more << " descriptors: " << ended.to_string();
  }
}

#ifdef KVFERRY_TEST_THREAD_LIMIT  // sanitizers map far more
TEST(Limits, OfAddressSpace) {
  for (int more = 0; more <= 128; more += 4) {
    const auto ended = Program::run("little_address_space", std::to_string(more));
    EXPECT_TRUE(ended.right()) << more << " MiB: " << ended.to_string();
  }
}
#endif

TEST(Limits, DescriptorsUsedUpByOthers) {
  const auto ended = Program::run("descriptors_used_up_later");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

#ifdef KVFERRY_TEST_THREAD_LIMIT
TEST(Limits, OfThreads) {
  for (int more = 0; more <= 16; ++more) {
    const auto ended = Program::run("few_threads", std::to_string(more));
    EXPECT_TRUE(ended.right()) << more << " threads: " << ended.to_string();
  }
}
#endif

}  // namespace
}  // namespace kvferry::tcp::testing
