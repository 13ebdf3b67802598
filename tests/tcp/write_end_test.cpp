// SPDX-License-Identifier: Apache-2.0
//
// An ended write stays ended: nothing of it lands afterwards, with any cause of the end and any kind of connection.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/testing/patterns.hpp>
#include <kvferry/testing/pausable_executor.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::write_end {
namespace {

using kvferry::testing::PausableExecutor;
using std::chrono::milliseconds;

constexpr std::size_t page = std::size_t{256} << 10;
constexpr std::size_t pages = 8;
using kvferry_test::long_enough;

/// Memory for `pages` pages, and a channel that offers it.
struct Owner {
  explicit Owner(TcpOptions options) : memory(pages * page) {
    options.regions = {{memory.data(), memory.size(), page, Access::read_write}};
    options.peer_init_url = kvferry::testing::own_loopback_url();
    channel = std::make_unique<TcpTransferChannel>(std::move(options));
  }

  [[nodiscard]] bool page_is(std::size_t index, std::byte value) const {
    return bool{kvferry::testing::is_constant(std::span(memory).subspan(index * page, page), value)};
  }

  std::vector<std::byte> memory;
  std::unique_ptr<TcpTransferChannel> channel;
};

/// Connections over so many lanes to an owner that can be held up, of whose bytes much waits in the kernel then; and whether
/// a batch is spread over them.
class WriteEnd : public ::testing::TestWithParam<std::pair<std::size_t, bool>> {
 protected:
  [[nodiscard]] TcpOptions writer_options(milliseconds drain_timeout = milliseconds(50)) const {
    TcpOptions options;
    options.handshake_timeout = long_enough;
    options.drain_timeout = drain_timeout;
    options.lanes_per_peer = GetParam().first;
    options.stripe_threshold = GetParam().second ? page : std::size_t{1} << 30;
    return options;
  }
  [[nodiscard]] TcpOptions owner_options() {
    TcpOptions options = writer_options();
    options.executor = executor_.executor();
    options.receive_buffer = 64 << 10;
    return options;
  }

  void connect(TcpTransferChannel& writer, const char* id) {
    writer.lazy_init_peer_connection(id, "owner", owner_.channel->peer_init_url());
  }

  /// `count` objects of one value.
  [[nodiscard]] std::vector<ConstBuffer> objects(std::byte value, std::size_t count = pages) {
    auto& bytes = sources_.emplace_back(page, value);
    return std::vector<ConstBuffer>(count, ConstBuffer(bytes));
  }

  [[nodiscard]] static const std::vector<std::uint64_t>& all_indexes() {
    static const std::vector<std::uint64_t> indexes{0, 1, 2, 3, 4, 5, 6, 7};
    static_assert(pages == 8);
    return indexes;
  }

  [[nodiscard]] static std::uint64_t sent_by(const TcpTransferChannel& channel) {
    std::uint64_t sent = 0;
    for (const auto& path : channel.stats().paths) {
      sent += path.bytes_out;
    }
    return sent;
  }

  /// Writes all pages and gives that up, when some of it has been sent, while the owner is held up.
  std::error_code give_up(TcpTransferChannel& writer, std::byte value) {
    const std::uint64_t before = sent_by(writer);
    asio::io_context context;
    asio::cancellation_signal signal;
    std::optional<std::error_code> outcome;
    const auto indexes = all_indexes();
    writer.async_batched_write(
        objects(value), {.peer_id = "owner", .remote_indexes = indexes, .timeout = long_enough},
        asio::bind_cancellation_slot(signal.slot(), asio::bind_executor(context, [&](std::error_code ec, std::size_t) {
                                       outcome = ec;
                                     })));
    while (sent_by(writer) < before + page && !outcome) {
      context.run_for(milliseconds(1));
      context.restart();
    }
    signal.emit(asio::cancellation_type::terminal);
    context.run_for(2 * long_enough);
    return outcome.value_or(std::make_error_code(std::errc::io_error));
  }

  PausableExecutor executor_;
  Owner owner_{owner_options()};
  std::list<std::vector<std::byte>> sources_;
};

INSTANTIATE_TEST_SUITE_P(Lanes, WriteEnd,
                         ::testing::Values(std::pair(1, false), std::pair(2, false), std::pair(4, false),
                                           std::pair(2, true), std::pair(4, true)));

TEST_P(WriteEnd, WhatWasGivenUpDoesNotLandOverWhatWasWrittenAnew) {
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  for (int round = 0; round < 5; ++round) {
    executor_.pause(long_enough);
    const auto first = give_up(writer, std::byte{0xaa});
    EXPECT_EQ(first, condition::cancelled) << first.message();
    EXPECT_EQ(first, condition::may_still_land);
    const std::vector<std::uint64_t> last{pages - 1};
    auto second = writer.async_batched_write(objects(std::byte{0xbb}, 1),
                                             {.peer_id = "owner", .remote_indexes = last, .timeout = long_enough},
                                             asio::use_future);
    executor_.resume();
    EXPECT_EQ(second.get(), 1U);
    EXPECT_TRUE(owner_.page_is(pages - 1, std::byte{0xbb}));
    // The other operations go over the same threads and connections.
    EXPECT_EQ(writer.batched_write(objects(std::byte{1}, pages - 1),
                                   {.peer_id = "owner", .remote_indexes = std::span(all_indexes()).first(pages - 1)}),
              pages - 1);
    EXPECT_TRUE(owner_.page_is(pages - 1, std::byte{0xbb}));
  }
}

TEST_P(WriteEnd, WhatAnAnsweringPeerHasDealtWithLeavesNoDoubt) {
  TcpTransferChannel writer(writer_options(long_enough));
  connect(writer, "writer");
  for (int round = 0; round < 20; ++round) {
    const auto error = give_up(writer, std::byte{0xaa});
    EXPECT_TRUE(!error || error == errc::cancelled) << error.message();
    const auto memory = owner_.memory;
    EXPECT_EQ(writer.batched_write(objects(std::byte{0}, 1), {.peer_id = "owner", .remote_indexes = std::span(all_indexes()).first(1)}),
              1U);
    EXPECT_TRUE(std::equal(memory.begin() + page, memory.end(), owner_.memory.begin() + page)) << "changed after the end";
  }
}

TEST_P(WriteEnd, BatchesAreSpreadWhereTheyAreToBe) {
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  EXPECT_EQ(writer.batched_write(objects(std::byte{1}), {.peer_id = "owner", .remote_indexes = all_indexes()}), pages);
  std::size_t lanes = 0;
  for (const auto& path : writer.stats().paths) {
    lanes += std::size_t{path.bytes_out > page};
  }
  EXPECT_EQ(lanes, GetParam().second ? GetParam().first : 1);
}

TEST_P(WriteEnd, OfABatchThatIsSpreadTheLastObjectOfAPageWins) {
  auto options = writer_options();
  options.stripe_threshold = 1;
  TcpTransferChannel writer(std::move(options));
  connect(writer, "writer");
  for (int round = 0; round < 20; ++round) {
    std::vector<ConstBuffer> batch;
    for (std::size_t i = 0; i < pages; ++i) {
      batch.push_back(objects(static_cast<std::byte>(i + 1), 1).front());
    }
    const std::vector<std::uint64_t> same(pages, 2);
    EXPECT_EQ(writer.batched_write(batch, {.peer_id = "owner", .remote_indexes = same}), pages);
    EXPECT_TRUE(owner_.page_is(2, std::byte{pages}));
    sources_.clear();
  }
  std::vector<std::byte> target(page);
  std::vector<std::uint64_t> indexes = all_indexes();
  std::ranges::fill(std::span(owner_.memory).last(page), std::byte{0x77});
  EXPECT_EQ(writer.batched_read(std::vector<MutableBuffer>(pages, MutableBuffer(target)), {.peer_id = "owner", .remote_indexes = indexes}),
            pages);
  EXPECT_TRUE(kvferry::testing::is_constant(target, std::byte{0x77}));
}

TEST_P(WriteEnd, OfAChannelThatIsClosedIsCertainOrSaysThatItIsNot) {
  auto writer = std::make_unique<TcpTransferChannel>(writer_options());
  connect(*writer, "writer");
  executor_.pause(long_enough);
  const auto indexes = all_indexes();
  auto first = writer->async_batched_write(objects(std::byte{0xaa}),
                                           {.peer_id = "owner", .remote_indexes = indexes}, asio::use_future);
  while (sent_by(*writer) < page) {
    std::this_thread::yield();
  }
  writer->close();
  try {
    (void)first.get();
    FAIL() << "the owner can't have answered";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), errc::closed_in_flight);
    EXPECT_EQ(error.code(), condition::may_still_land);
  }
  writer.reset();
  executor_.resume();
  owner_.channel->fence("writer");
  const auto memory = owner_.memory;
  TcpTransferChannel other(writer_options());
  connect(other, "other");
  EXPECT_EQ(other.batched_write(objects(std::byte{0xbb}), {.peer_id = "owner", .remote_indexes = indexes}), pages);
  EXPECT_TRUE(kvferry::testing::is_constant(owner_.memory, std::byte{0xbb}));
}

TEST_P(WriteEnd, AChannelThatIsClosedWaitsForPeersThatAnswer) {
  const auto indexes = all_indexes();
  for (int round = 0; round < 5; ++round) {
    TcpTransferChannel writer(writer_options(long_enough));
    connect(writer, "writer");
    auto write = writer.async_batched_write(objects(std::byte{0xaa}), {.peer_id = "owner", .remote_indexes = indexes},
                                            asio::use_future);
    writer.close();
    const auto memory = owner_.memory;
    try {
      EXPECT_EQ(write.get(), pages);
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::closed);
    }
    owner_.channel->fence("writer");
    EXPECT_EQ(owner_.memory, memory);
  }
}

TEST_P(WriteEnd, AFenceWaitsForWhatThePeerHasStarted) {
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  const auto indexes = all_indexes();
  for (int round = 1; round <= 20; ++round) {
    auto write = writer.async_batched_write(objects(static_cast<std::byte>(round)),
                                            {.peer_id = "owner", .remote_indexes = indexes}, asio::use_future);
    owner_.channel->fence("writer");
    EXPECT_TRUE(kvferry::testing::is_constant(owner_.memory, static_cast<std::byte>(round)));
    EXPECT_EQ(write.get(), pages);
  }
  EXPECT_TRUE(owner_.channel->remote_xfer_handler_exists("writer"));
}

TEST_P(WriteEnd, SeveralFencesAtATimeEndEachForItself) {
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  std::vector<std::future<void>> fences;
  for (int i = 0; i < 20; ++i) {
    fences.push_back(owner_.channel->async_fence("writer", {}, asio::use_future));
    fences.push_back(writer.async_fence("owner", {}, asio::use_future));
  }
  for (auto& fence : fences) {
    ASSERT_EQ(fence.wait_for(long_enough), std::future_status::ready);
    EXPECT_NO_THROW(fence.get());
  }
}

TEST_P(WriteEnd, AFenceBreaksTheConnectionOfAPeerThatDoesNotAnswer) {
  // The owner is the one that can't be reached here: it doesn't answer the writer's fence.
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  executor_.pause(long_enough);
  std::error_code error;
  writer.fence("owner", milliseconds(50), error);
  EXPECT_FALSE(error) << error.message();
  EXPECT_FALSE(writer.remote_xfer_handler_exists("owner"));
  executor_.resume();
  EXPECT_EQ(writer.batched_write(objects(std::byte{5}, 1), {.peer_id = "owner", .remote_indexes = std::span(all_indexes()).first(1)}), 1U);
}

TEST_P(WriteEnd, AFenceCanBeCancelled) {
  TcpTransferChannel writer(writer_options());
  connect(writer, "writer");
  executor_.pause(long_enough);
  asio::io_context context;
  asio::cancellation_signal signal;
  std::optional<std::error_code> outcome;
  writer.async_fence("owner", long_enough,
                     asio::bind_cancellation_slot(
                         signal.slot(), asio::bind_executor(context, [&](std::error_code ec) { outcome = ec; })));
  signal.emit(asio::cancellation_type::terminal);
  context.run_for(long_enough);
  EXPECT_EQ(outcome, std::optional(std::error_code(errc::cancelled)));
  EXPECT_TRUE(writer.remote_xfer_handler_exists("owner"));
  executor_.resume();
}

TEST_P(WriteEnd, AFenceOfNobodyReturnsAtOnce) {
  std::error_code error;
  owner_.channel->fence("nobody", {}, error);
  EXPECT_FALSE(error);
  owner_.channel->fence("", {}, error);
  EXPECT_EQ(error, errc::empty_peer_id);
  EXPECT_THROW(owner_.channel->fence(""), TransferError);
  owner_.channel->close();
  owner_.channel->fence("nobody", {}, error);
  EXPECT_EQ(error, errc::closed);
}

}  // namespace
}  // namespace kvferry::tcp::write_end
