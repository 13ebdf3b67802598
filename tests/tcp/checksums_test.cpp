// SPDX-License-Identifier: Apache-2.0
// Checksums between two channels, over a network that changes bits.
#include <gtest/gtest.h>

#include <future>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

constexpr std::size_t batch_pages = 8;
/// Within the payload of the next frame: behind its header and its descriptors, in the third page.
constexpr std::size_t in_third_page = 64 + 16 * batch_pages + 2 * page_size + 1000;

TcpOptions checked() {
  TcpOptions options;
  options.checksums = true;
  return options;
}

void expect_third_differs(std::error_code ec, std::size_t transferred, const std::vector<std::error_code>& statuses) {
  EXPECT_EQ(ec, errc::checksum_mismatch) << ec.message();
  EXPECT_EQ(transferred, batch_pages - 1);
  for (std::size_t i = 0; i < batch_pages; ++i) {
    EXPECT_EQ(statuses[i], i == 2 ? std::error_code(errc::checksum_mismatch) : std::error_code()) << i;
  }
}

TEST(ChecksumsOnTheWay, AWriteThatArrivesWrongFailsAndIsToldToNobody) {
  RelayedPair pair(batch_pages, checked());
  pair.a.fill(1);
  const auto all = indexes(batch_pages);
  const std::vector<std::byte> note(4, std::byte{1});
  std::vector<std::error_code> statuses(batch_pages);
  std::string diagnostic;
  std::error_code ec;
  pair.relay.flip_after(in_third_page, true);
  const std::size_t written = pair.a.channel->batched_write(
      pair.a.pages(batch_pages),
      {.peer_id = "b", .remote_indexes = all, .notification = note, .statuses = statuses, .diagnostic = &diagnostic},
      ec);
  expect_third_differs(ec, written, statuses);
  EXPECT_NE(diagnostic.find("object 2 "), std::string::npos) << diagnostic;
  EXPECT_EQ(pair.b->channel->stats().checksum_mismatches, 1U);
  EXPECT_EQ(pair.b->channel->stats().pending_notifications, 0U);
  const auto stats = pair.a.channel->stats().of(TransferKind::write);
  EXPECT_EQ(stats.objects, batch_pages - 1);
  EXPECT_EQ(stats.bytes, (batch_pages - 1) * page_size);
  ASSERT_EQ(stats.failures.size(), 1U);
  EXPECT_EQ(stats.failures[0].cause, errc::checksum_mismatch);

  EXPECT_EQ(
      pair.a.channel->batched_write(pair.a.pages(batch_pages), {.peer_id = "b", .remote_indexes = all, .notification = note}),
      batch_pages);
  EXPECT_EQ(pair.b->channel->receive_notification(long_enough).payload, note);
  EXPECT_EQ(pair.a.memory, pair.b->memory);
}

TEST(ChecksumsOnTheWay, AReadThatArrivesWrongFails) {
  RelayedPair pair(batch_pages, checked());
  pair.b->fill(1);
  const auto all = indexes(batch_pages);
  std::vector<std::error_code> statuses(batch_pages);
  std::error_code ec;
  pair.relay.flip_after(in_third_page - 16 * batch_pages, false);  // an answer has no descriptors
  const std::size_t read = pair.a.channel->batched_read(
      pair.a.pages(batch_pages), {.peer_id = "b", .remote_indexes = all, .statuses = statuses}, ec);
  expect_third_differs(ec, read, statuses);
  EXPECT_EQ(pair.a.channel->stats().checksum_mismatches, 1U);
}

TEST(ChecksumsOnTheWay, ASendThatArrivesWrongFailsOnBothSides) {
  RelayedPair pair(batch_pages);
  pair.a.fill(1);
  std::vector<std::error_code> received(batch_pages);
  auto recv = pair.b->channel->async_batched_recv(
      pair.b->pages(batch_pages), {.peer_id = "a", .tag = 5, .checksums = true, .statuses = received}, asio::use_future);
  // The recv may meet the send at once, or be on its way still: either way the send's frame is the next one to the target.
  std::vector<std::error_code> statuses(batch_pages);
  std::error_code ec;
  pair.relay.flip_after(in_third_page, true);
  const std::size_t sent =
      pair.a.channel->batched_send(pair.a.pages(batch_pages), {.peer_id = "b", .tag = 5, .statuses = statuses}, ec);
  expect_third_differs(ec, sent, statuses);
  EXPECT_THROW((void)recv.get(), std::system_error);
  expect_third_differs(errc::checksum_mismatch, batch_pages - 1, received);
}

}  // namespace
}  // namespace kvferry::tcp::testing
