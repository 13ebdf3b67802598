// SPDX-License-Identifier: Apache-2.0
// A thread that calls the library may have a small stack, as those of many servers and the fibres of others.
#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <system_error>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include "channel_pair.hpp"
#include "common/small_stack.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

constexpr std::size_t small_stack_pages = 600;

/// All that is done with channels, and the channels themselves.
void use_channels(bool encrypted) {
  TcpOptions options;
  options.default_timeout = long_enough;
  if (encrypted) {
    options.keyring = group_keyring();
  }
  Node a(small_stack_pages, options);
  Node b(small_stack_pages, options);
  a.fill(1);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  const auto objects = a.pages(small_stack_pages);
  const std::vector<ConstBuffer> sources(objects.begin(), objects.end());
  const auto all = indexes(small_stack_pages);
  for (const bool checksums : {false, true}) {
    EXPECT_EQ(a.channel->batched_write(sources, {.peer_id = "b", .remote_indexes = all, .checksums = checksums}),
              small_stack_pages);
    EXPECT_EQ(a.channel->batched_read(objects, {.peer_id = "b", .remote_indexes = all, .checksums = checksums}),
              small_stack_pages);
  }
  EXPECT_EQ(a.memory, b.memory);
  std::error_code nobody;
  a.channel->lazy_init_peer_connection("a", "c", "tcp://127.0.0.1:1", {}, {.timeout = std::chrono::milliseconds(200)},
                                       nobody);
  EXPECT_EQ(nobody, errc::timed_out);
}

TEST(SmallStack, HoldsCallsInTheClear) {
  kvferry_test::on_small_stack([] { use_channels(false); });
}

TEST(SmallStack, HoldsEncryptedCalls) {
  kvferry_test::on_small_stack([] { use_channels(true); });
}

}  // namespace
}  // namespace kvferry::tcp::testing
