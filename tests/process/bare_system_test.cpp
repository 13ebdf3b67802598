// SPDX-License-Identifier: Apache-2.0
// A container of nothing but the program: no /etc/resolv.conf, no /etc/hosts, no /etc/services.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>

#include "program.hpp"
#include "tcp/channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using kvferry::testing::Program;

/// @return whether /etc is empty from here on, for this process alone.
bool empty_etc() {
  return (::unshare(CLONE_NEWNS) == 0 || ::unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0) &&
         ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         ::mount("none", "/etc", "tmpfs", 0, nullptr) == 0 && ::access("/etc/hosts", F_OK) != 0 &&
         ::access("/etc/resolv.conf", F_OK) != 0;
}

}  // namespace

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

}  // namespace
}  // namespace kvferry::tcp::testing
