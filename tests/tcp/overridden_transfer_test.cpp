// SPDX-License-Identifier: Apache-2.0
// A program that looks at all transfers of a channel overrides one function.
#include <gtest/gtest.h>

#include <asio/use_future.hpp>

#include <atomic>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "channel_pair.hpp"
#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Counts what it starts, and notifies its peer of each write.
class CountingChannel final : public TcpTransferChannel {
 public:
  using TcpTransferChannel::TcpTransferChannel;
  ~CountingChannel() override { close(); }

  [[nodiscard]] int transfers() const noexcept { return transfers_; }

 protected:
  void start_transfer(TransferRequest request, Completion completion) override {
    ++transfers_;
    if (!request.objects.empty() && request.kind == TransferKind::write) {
      async_notify(request.peer_id, std::vector<std::byte>(1), {}, [](std::error_code) {});
    }
    TcpTransferChannel::start_transfer(std::move(request), std::move(completion));
  }

 private:
  std::atomic<int> transfers_{0};
};

TEST(OverriddenTransfer, SeesBlockingCallsAndOthers) {
  Node b(4);
  std::vector<std::byte> page(page_size, std::byte{1});
  CountingChannel a{kvferry_test::patient(TcpOptions())};
  a.lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  const auto first = indexes(1);
  EXPECT_EQ(a.batched_write({ConstBuffer(page)}, {.peer_id = "b", .remote_indexes = first}), 1U);
  EXPECT_EQ(b.memory[0], std::byte{1});
  EXPECT_EQ(a.transfers(), 2) << "the write and its notification";
  EXPECT_EQ(b.channel->receive_notification(long_enough).payload.size(), 1U);
  EXPECT_EQ(a.batched_read({MutableBuffer(page)}, {.peer_id = "b", .remote_indexes = first}), 1U);
  EXPECT_EQ(a.transfers(), 3);
  a.notify("b", std::vector<std::byte>(2));
  EXPECT_EQ(a.transfers(), 4);
  EXPECT_EQ(b.channel->receive_notification(long_enough).payload.size(), 2U);
  EXPECT_EQ(
      a.async_batched_read({MutableBuffer(page)}, {.peer_id = "b", .remote_indexes = first}, asio::use_future).get(),
      1U);
  EXPECT_EQ(a.transfers(), 5);
}

}  // namespace
}  // namespace kvferry::tcp::testing
