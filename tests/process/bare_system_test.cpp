// SPDX-License-Identifier: Apache-2.0
// A container of nothing but the program: no /etc/resolv.conf, no /etc/hosts, no /etc/services.
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "common/forbidden_calls.hpp"
#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;
using kvferry_test::forbid;

/// @return whether /etc is empty from here on, for this process alone.
bool empty_etc() {
  return (::unshare(CLONE_NEWNS) == 0 || ::unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0) &&
         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", "/etc", "tmpfs", 0, nullptr) == 0 && ::access("/etc/hosts", F_OK) != 0 &&
         ::access("/etc/resolv.conf", F_OK) != 0;
}

/// @return whether no socket of this process can have its congestion control chosen from here on: a sandbox may have none, and
/// a system may allow none but its own (net.ipv4.tcp_allowed_congestion_control).
bool forbid_congestion_control() {
  constexpr auto argument = [](std::size_t number) {
    return static_cast<std::uint32_t>(offsetof(seccomp_data, args) + number * sizeof(std::uint64_t));
  };
  std::array filter{sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                    sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_setsockopt, 0, 5),
                    sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument(1)),
                    sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_TCP, 0, 3),
                    sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, argument(2)),
                    sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, TCP_CONGESTION, 0, 1),
                    sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                    sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  return kvferry_test::filter_calls(filter);
}

/// Moves pages with checksums, and then some of which the memory is gone.
/// @return an exit code.
int move_pages() {
  constexpr std::size_t pages = 4;
  TcpOptions options;
  options.checksums = true;
  Node decode(pages, options);
  Node prefill(pages, options, false);
  prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
  prefill.fill(1);
  const auto all = indexes(pages);
  prefill.channel->batched_write(prefill.pages(pages), {.peer_id = "decode", .remote_indexes = all});
  if (decode.memory != prefill.memory) {
    return 1;
  }
  // A few bytes are caught by the read for their header, and copied from there.
  void* const gone = ::mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const std::vector<std::uint64_t> first{0};
  std::error_code read;
  prefill.channel->batched_read({MutableBuffer(static_cast<std::byte*>(gone), 64)},
                                {.peer_id = "decode", .remote_indexes = first}, read);
  std::error_code written;
  prefill.channel->batched_write({ConstBuffer(static_cast<const std::byte*>(gone), 64)},
                                 {.peer_id = "decode", .remote_indexes = first}, written);
  std::fprintf(stderr, "read: %s, write: %s\n", read.message().c_str(), written.message().c_str());
  return read == errc::memory_fault && written == errc::memory_fault ? 0 : 1;
}

/// @return an exit code: 0 if no channel can be made, for want of a permission that is named.
int no_channel_without(const char* what) {
  try {
    const Node node(1);
    return 1;
  } catch (const TransferError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    const bool named = std::string(error.what()).find(what) != std::string::npos;
    return error.code() == std::errc::operation_not_permitted && named ? 0 : 1;
  }
}

}  // namespace

KVFERRY_PROGRAM(no_event_descriptors) {
  if (!forbid({__NR_eventfd2})) {
    std::perror("no filter of system calls");
    return 1;
  }
  try {
    const Node node(1);
    return 1;
  } catch (const TransferError& error) {
    return error.code() == std::errc::operation_not_permitted ? 0 : 1;
  }
}

KVFERRY_PROGRAM(no_files_in_memory) {
  if (!forbid({__NR_memfd_create})) {
    std::perror("no filter of system calls");
    return 1;
  }
  return move_pages();
}

KVFERRY_PROGRAM(small_files_alone) {
  const rlimit small{4096, RLIM_INFINITY};
  return ::setrlimit(RLIMIT_FSIZE, &small) == 0 ? move_pages() : 1;
}

KVFERRY_PROGRAM(no_memory_that_the_kernel_copies) {
  if (!forbid({__NR_memfd_create, __NR_process_vm_readv})) {
    std::perror("no filter of system calls");
    return 1;
  }
  return no_channel_without("memfd_create (Operation not permitted), and in its place process_vm_readv");
}

KVFERRY_PROGRAM(no_scheduling) {
  if (!forbid({__NR_sched_setscheduler})) {
    std::perror("no filter of system calls");
    return 1;
  }
  return no_channel_without("sched_setscheduler");
}

KVFERRY_PROGRAM(no_choice_of_congestion_control) {
  if (!forbid_congestion_control()) {
    std::perror("no filter of system calls");
    return 1;
  }
  Node decode(1);
  Node prefill(1, {}, false);
  prefill.channel->lazy_init_peer_connection("prefill", "decode", decode.channel->peer_init_url());
  prefill.fill(1);
  const auto pages = indexes(1);
  prefill.channel->batched_write(prefill.pages(1), {.peer_id = "decode", .remote_indexes = pages});
  TcpOptions chosen;
  chosen.congestion_control = "reno";
  try {
    const Node other(1, chosen);
    return 1;  // who asks for one is told
  } catch (const TransferError& error) {
    return error.code() == std::errc::operation_not_permitted && decode.memory == prefill.memory ? 0 : 1;
  }
}

KVFERRY_PROGRAM(empty_etc) {
  if (!empty_etc()) {
    std::perror("no mounts of its own");
    return 1;
  }
  Node decode(1);
  Node prefill(1, {}, false);
  const std::string url = decode.channel->peer_init_url();
  const std::string port = url.substr(url.rfind(':'));
  prefill.fill(1);
  for (const char* const host : {"127.0.0.1", "localhost"}) {
    std::error_code ec;
    std::string why;
    const std::string id = std::string("decode at ") + host;
    prefill.channel->lazy_init_peer_connection("prefill", id, "tcp://" + (host + port), {}, {.diagnostic = &why}, ec);
    if (!ec) {
      const auto pages = indexes(1);
      prefill.channel->batched_write(prefill.pages(1),
                                     {.peer_id = id, .remote_indexes = pages, .diagnostic = &why}, ec);
    }
    if (ec) {
      std::fprintf(stderr, "%s: %s: %s\n", host, ec.message().c_str(), why.c_str());
      return 1;
    }
  }
  std::error_code ec;
  std::string why;
  prefill.channel->lazy_init_peer_connection("prefill", "nobody", "tcp://some.host.example" + port, {},
                                             {.timeout = std::chrono::seconds(3), .diagnostic = &why}, ec);
  std::printf("%s: %s\n", ec.message().c_str(), why.c_str());
  return ec && why.find("some.host.example") != std::string::npos && decode.memory == prefill.memory ? 0 : 1;
}

namespace {

TEST(BareSystem, ChannelsWorkWithoutAnythingInEtc) {
  const auto ended = Program::run("empty_etc");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

TEST(BareSystem, WhereNoEventDescriptorIsAllowedThatIsAnError) {
  const auto ended = Program::run("no_event_descriptors");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

TEST(BareSystem, ChannelsWorkWithoutFilesInMemory) {
  for (const char* const program : {"no_files_in_memory", "small_files_alone"}) {
    const auto ended = Program::run(program);
    EXPECT_TRUE(ended.right()) << program << ": " << ended.to_string();
  }
}

TEST(BareSystem, WhereNothingIsAllowedThatTheKernelCopiesThatIsAnError) {
  const auto ended = Program::run("no_memory_that_the_kernel_copies");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

// libzmq ends the process then.
TEST(BareSystem, WhereThreadsMayNotSetTheirSchedulingThatIsAnError) {
  const auto ended = Program::run("no_scheduling");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

TEST(BareSystem, ChannelsWorkWhereCongestionControlCannotBeChosen) {
  const auto ended = Program::run("no_choice_of_congestion_control");
  EXPECT_TRUE(ended.right()) << ended.to_string();
}

}  // namespace
}  // namespace kvferry::tcp::testing
