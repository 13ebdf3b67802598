// SPDX-License-Identifier: Apache-2.0
// Faults of connecting: lines 6 to 9 of docs/fault_table.md.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <chrono>
#include <future>
#include <thread>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/testing/own_loopback.hpp>
#include <kvferry/url.hpp>

#include "channel_pair.hpp"
#include "common/lasting_port.hpp"
#include "init_question.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

using std::chrono::milliseconds;

/// How many TCP connections this process has open to or from a port.
std::size_t connections_at(std::uint16_t port) {
  std::size_t count = 0;
  for (int fd = 0; fd < 4096; ++fd) {
    sockaddr_in local{};
    sockaddr_in remote{};
    socklen_t size = sizeof(local);
    if (::getsockname(fd, reinterpret_cast<sockaddr*>(&local), &size) != 0 || local.sin_family != AF_INET) {
      continue;
    }
    size = sizeof(remote);
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&remote), &size) != 0) {
      continue;
    }
    count += ntohs(local.sin_port) == port || ntohs(remote.sin_port) == port ? 1U : 0U;
  }
  return count;
}

TEST(ConnectFaults, Line06_TwoThatDialAtOnceEndWithOneConnectionAndNoLeak) {
  for (int round = 0; round < 20; ++round) {
    Node a(4);
    Node b(4);
    std::thread other([&] { b.channel->lazy_init_peer_connection("b", "a", a.channel->peer_init_url()); });
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
    other.join();
    EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
    EXPECT_EQ(b.channel->batched_write(b.pages(4), {.peer_id = "a", .remote_indexes = indexes(4)}), 4U);
    // One connection has two ends in this process; a second one would add two more. One that was given up for the other may be just
    // going.
    const auto connections = [&] {
      return connections_at(a.channel->data_port()) + connections_at(b.channel->data_port());
    };
    std::size_t left = connections();
    for (const auto until = std::chrono::steady_clock::now() + long_enough;
         left != 2 && std::chrono::steady_clock::now() < until; left = connections()) {
      std::this_thread::yield();
    }
    EXPECT_EQ(left, 2U) << "round " << round;
  }
}

TEST(ConnectFaults, Line06_APeerIsNotPublishedBeforeItsConnectionsAreThere) {
  Node b(4);
  Node asking(4);
  const auto answer =
      asking.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(question()));
  EXPECT_TRUE(answer.is<kit::InitAnswer>());
  EXPECT_FALSE(b.channel->remote_xfer_handler_exists("stranger"));
  std::error_code ec;
  b.channel->batched_write(b.pages(1), {.peer_id = "stranger", .remote_indexes = indexes(1)}, ec);
  EXPECT_EQ(ec, errc::unknown_peer);
}

TEST(ConnectFaults, Line03_ADataConnectionThatIsNotAnsweredEndsTheHandshakeInTime) {
  MutePeer mute;
  Node a(4, {}, false);
  for (int attempt = 0; attempt < 2; ++attempt) {
    std::error_code ec;
    std::string diagnostic;
    a.channel->lazy_init_peer_connection("a", "mute", mute.node.channel->peer_init_url(), {},
                                         {.timeout = milliseconds(300), .diagnostic = &diagnostic}, ec);
    EXPECT_EQ(ec, errc::timed_out) << diagnostic;
    EXPECT_NE(diagnostic.find("'mute'"), std::string::npos) << diagnostic;
    EXPECT_FALSE(a.channel->remote_xfer_handler_exists("mute"));
    EXPECT_FALSE(mute.node.channel->remote_xfer_handler_exists("a"));
  }
}

TEST(ConnectFaults, Line05_CloseEndsAHandshakeWhoseDataConnectionIsNotAnswered) {
  for (const bool dialing_side : {true, false}) {
    // On a busy machine no data connection may be made in a short time.
    bool dialed = false;
    for (milliseconds timeout = dialing_side ? milliseconds(long_enough) : milliseconds(300); !dialed; timeout *= 10) {
      ASSERT_LE(timeout, long_enough) << "no data connection was made";
      MutePeer mute;
      Node a(4, {}, false);
      auto dialing = std::async(std::launch::async, [&] {
        std::error_code ec;
        a.channel->lazy_init_peer_connection("a", "mute", mute.node.channel->peer_init_url(), {}, {.timeout = timeout},
                                             ec);
        return ec;
      });
      mute.acceptor.non_blocking(true);
      std::error_code none = asio::error::would_block;
      asio::ip::tcp::socket connection(mute.context);
      while (none == asio::error::would_block && dialing.wait_for(milliseconds(1)) != std::future_status::ready) {
        mute.acceptor.accept(connection, none);
      }
      dialed = !none;
      (dialing_side ? a : mute.node).channel->close();
      const auto ec = dialing.get();
      EXPECT_EQ(ec, dialing_side && dialed ? errc::closed : errc::timed_out) << ec.message();
    }
  }
}

TEST(ConnectFaults, Line07_MismatchesNameTheFieldAndBothValues) {
  Node b(4);
  Node asking(4);
  const auto ask = [&](const kit::InitQuestion& made) {
    std::string diagnostic;
    std::error_code ec;
    (void)asking.channel->send_init_side_msg(b.channel->peer_init_url(), encode_side_message(made),
                                             {.diagnostic = &diagnostic}, ec);
    return std::pair(ec, diagnostic);
  };
  const auto expect = [&](const kit::InitQuestion& made, errc code, std::initializer_list<const char*> words) {
    const auto [ec, diagnostic] = ask(made);
    EXPECT_EQ(ec, code) << diagnostic;
    for (const char* word : words) {
      EXPECT_NE(diagnostic.find(word), std::string::npos) << "'" << word << "' in: " << diagnostic;
    }
  };
  auto made = question();
  made.version = 99;
  expect(made, errc::version_mismatch, {"protocol version", "99", "1", "'stranger'"});
  made = question();
  made.transport = "pigeon";
  expect(made, errc::transport_mismatch, {"transport", "pigeon", "tcp"});
  made = question();
  made.regions = {{8193, 4096, 3}};
  expect(made, errc::invalid_region, {"region 0", "8193", "4096"});
  made = question();
  made.regions = {{8192, 4096, 4}};
  expect(made, errc::invalid_region, {"access", "4"});
  made = question();
  made.sender_id.clear();
  expect(made, errc::empty_peer_id, {});
  for (const std::string& id : {std::string(max_peer_id_bytes + 1, 'n'), std::string("a\nb"), std::string("\x1b[0m")}) {
    made = question();
    made.sender_id = id;
    expect(made, errc::invalid_peer_id, {"sender"});
    made = question();
    made.receiver_id = id;
    expect(made, errc::invalid_peer_id, {"receiver"});
  }
  made = question();
  made.endpoint.clear();
  expect(made, errc::malformed_message, {"stranger"});
}

TEST(ConnectFaults, Line07_WhoInsistsOnEqualPagesGetsNoOthersByIndex) {
  Node b(4);
  std::vector<std::byte> memory(16384);
  TcpOptions options;
  options.regions = {{memory.data(), memory.size(), 8192}};
  TcpTransferChannel a(kvferry_test::patient(std::move(options)));
  a.lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  try {
    a.batched_write({ConstBuffer(memory).first(100)}, {.peer_id = "b", .remote_indexes = indexes(1)});
    FAIL() << "page sizes 8192 and 4096 were accepted";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::page_size_mismatch);
    EXPECT_NE(std::string(error.what()).find("8192"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("4096"), std::string::npos) << error.what();
  }
  const std::vector<RemoteRange> ranges{RemoteRange::contiguous(0, 4000, 8192)};
  EXPECT_EQ(a.batched_write({ConstBuffer(memory).first(8192)}, {.peer_id = "b", .remote_ranges = ranges}), 1U);
}

TEST(ConnectFaults, Line07_DifferentPageSizesCanBeAllowedOnBothSides) {
  TcpOptions b_options;
  b_options.require_equal_page_sizes = false;
  Node b(4, b_options);
  std::vector<std::byte> memory(16384, std::byte{7});
  TcpOptions options;
  options.require_equal_page_sizes = false;
  options.regions = {{memory.data(), memory.size(), 8192}};
  TcpTransferChannel a(kvferry_test::patient(std::move(options)));
  a.lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.batched_write({ConstBuffer(memory).first(100)}, {.peer_id = "b", .remote_indexes = indexes(1)}), 1U);
  std::error_code ec;
  a.batched_write({ConstBuffer(memory).first(8192)}, {.peer_id = "b", .remote_indexes = indexes(1)}, ec);
  EXPECT_EQ(ec, errc::object_too_large);
}

/// A peer that is replaced by a new incarnation at the same address.
TEST(ConnectFaults, Line08_ARestartedPeerIsRecognisedAndReconnectedTo) {
  Node a(4, {}, false);
  a.fill(1);
  TcpOptions options;
  options.peer_init_url = kvferry_test::lasting_url();
  std::optional<Node> b(std::in_place, 4, options);
  a.channel->lazy_init_peer_connection("a", "b", options.peer_init_url);
  const auto first = a.channel->peer_info("b")->incarnation;
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  b.reset();
  // A write that comes before the end of the connection is noticed meets just that, and may be tried again.
  for (const auto until = std::chrono::steady_clock::now() + long_enough;
       a.channel->remote_xfer_handler_exists("b") && std::chrono::steady_clock::now() < until;) {
    std::this_thread::yield();
  }

  b.emplace(4, options);
  // One-sided: the indexes were agreed with the old incarnation, so the caller must be told, once.
  std::error_code ec;
  std::string diagnostic;
  a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4), .diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, errc::peer_restarted) << diagnostic;
  EXPECT_EQ(ec, condition::peer_failed);
  EXPECT_NE(ec, condition::retryable);
  EXPECT_EQ(std::ranges::count(b->memory, std::byte{0}), static_cast<std::ptrdiff_t>(b->memory.size()));
  EXPECT_NE(a.channel->peer_info("b")->incarnation, first);
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  EXPECT_EQ(a.memory, b->memory);

  // Connecting anew acknowledges the new incarnation: nothing to be told then.
  b.reset();
  b.emplace(4, options);
  const auto failed = [&] { return !a.channel->remote_xfer_handler_exists("b"); };
  for (int i = 0; i < 100 && !failed(); ++i) {
    a.channel->batched_recv(a.pages(1), {.peer_id = "b", .timeout = milliseconds(100)}, ec);
  }
  a.channel->lazy_init_peer_connection("a", "b", options.peer_init_url);
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
}

TEST(ConnectFaults, Line08_ThePassiveSideSeesARestartToo) {
  Node b(4);
  std::optional<Node> a(std::in_place, 4);
  a->channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(b.channel->batched_write(b.pages(4), {.peer_id = "a", .remote_indexes = indexes(4)}), 4U);
  a.reset();
  a.emplace(4);
  a->channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  std::error_code ec;
  b.channel->batched_write(b.pages(4), {.peer_id = "a", .remote_indexes = indexes(4)}, ec);
  EXPECT_EQ(ec, errc::peer_restarted);
  EXPECT_EQ(b.channel->batched_write(b.pages(4), {.peer_id = "a", .remote_indexes = indexes(4)}), 4U);
}

TEST(ConnectFaults, Line08_NoWriteStartedBeforeARestartWasKnownReachesTheNewIncarnation) {
  Node a(8, {}, false);
  std::ranges::fill(a.memory, std::byte{0xaa});
  TcpOptions options;
  options.peer_init_url = kvferry_test::lasting_url();
  std::optional<Node> b(std::in_place, 8, options);
  a.channel->lazy_init_peer_connection("a", "b", options.peer_init_url);
  auto unmet = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
  b.reset();
  EXPECT_THROW(unmet.get(), std::system_error);  // the end of the connection has been noticed
  // These wait for a connection while the peer comes up again.
  std::vector<std::future<std::size_t>> writes;
  for (std::uint64_t i = 0; i < 8; ++i) {
    writes.push_back(a.channel->async_batched_write({a.page(i)}, {.peer_id = "b", .remote_indexes = {&i, 1}},
                                                    asio::use_future));
  }
  b.emplace(8, options);
  for (auto& write : writes) {
    try {
      write.get();
      ADD_FAILURE() << "a stale write succeeded";
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::peer_restarted);
    }
  }
  EXPECT_TRUE(std::ranges::all_of(b->memory, [](std::byte byte) { return byte == std::byte{0}; }));
  EXPECT_EQ(a.channel->batched_write(a.pages(8), {.peer_id = "b", .remote_indexes = indexes(8)}), 8U);
}

TEST(ConnectFaults, Line06_AYieldToADialThatCannotSucceedDoesNotLockThePeerOut) {
  for (int round = 0; round < 6; ++round) {
    Node a(4);
    TcpOptions options;
    options.peer_init_url = kvferry::testing::own_loopback_url();  // nobody else comes to where it has been
    std::optional<Node> b(std::in_place, 4, options);
    a.channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
    auto unmet = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
    b.reset();
    EXPECT_THROW(unmet.get(), std::system_error);
    // An operation keeps "a" dialing the old url, while the peer comes up at another one and dials "a".
    auto dialing =
        a.channel->async_batched_recv(a.pages(1), {.peer_id = "b", .timeout = long_enough}, asio::use_future);
    b.emplace(4);
    b->channel->lazy_init_peer_connection("b", "a", a.channel->peer_init_url());
    EXPECT_EQ(b->channel->batched_send(b->pages(1), {.peer_id = "a"}), 1U);
    EXPECT_EQ(dialing.get(), 1U);
  }
}

TEST(ConnectFaults, Line03_TimeoutsOfAnyLengthWork) {
  using milliseconds_max = std::integral_constant<std::int64_t, milliseconds::max().count()>;
  TcpOptions options;
  options.handshake_timeout = milliseconds(milliseconds_max::value);
  options.default_timeout = milliseconds(milliseconds_max::value);
  options.hello_timeout = milliseconds(milliseconds_max::value);
  options.drain_timeout = milliseconds(milliseconds_max::value);
  Node a(4, options);
  Node b(4, options);
  a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  EXPECT_EQ(a.channel->batched_write(a.pages(4), {.peer_id = "b", .remote_indexes = indexes(4)}), 4U);
  auto waiting = b.channel->async_receive_notification(milliseconds::max(), asio::use_future);
  const std::vector<std::byte> note(1);
  const auto first = indexes(1);
  EXPECT_EQ(a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = first, .notification = note}), 1U);
  EXPECT_EQ(waiting.get().payload, note);
  std::error_code ec;
  a.channel->batched_recv(a.pages(1), {.peer_id = "b", .timeout = milliseconds::min()}, ec);
  EXPECT_EQ(ec, errc::timed_out);
  Node never(4, [] {
    TcpOptions none;
    none.handshake_timeout = milliseconds(0);
    return none;
  }());
  never.channel->lazy_init_peer_connection("n", "b", b.channel->peer_init_url(), {}, {}, ec);
  EXPECT_EQ(ec, errc::timed_out);
}

TEST(ConnectFaults, APeerThatIsOutOfUseMakesRoomForANewOne) {
  TcpOptions options;
  options.max_peers = 2;
  Node hub(4, options);
  for (int i = 0; i < 6; ++i) {
    Node peer(4, {}, false);
    peer.channel->lazy_init_peer_connection("peer " + std::to_string(i), "hub", hub.channel->peer_init_url());
    auto unmet = hub.channel->async_batched_recv(hub.pages(1), {.peer_id = "peer " + std::to_string(i)}, asio::use_future);
    peer.channel.reset();
    EXPECT_THROW(unmet.get(), std::system_error);
  }
  Node first(4, {}, false);
  Node second(4, {}, false);
  Node third(4, {}, false);
  first.channel->lazy_init_peer_connection("first", "hub", hub.channel->peer_init_url());
  second.channel->lazy_init_peer_connection("second", "hub", hub.channel->peer_init_url());
  std::error_code ec;
  std::string diagnostic;
  third.channel->lazy_init_peer_connection("third", "hub", hub.channel->peer_init_url(), {}, {.diagnostic = &diagnostic},
                                           ec);
  EXPECT_EQ(ec, errc::resource_limit) << diagnostic;
  EXPECT_NE(diagnostic.find("2 peers"), std::string::npos) << diagnostic;
}

TEST(Construction, AnAdvertisedAddressThatIsNoneIsRefusedNotWaitedFor) {
  TcpOptions options;
  options.peer_init_url = kvferry::testing::own_loopback_url();
  options.advertised_data_address = "nonsense";
  try {
    TcpTransferChannel channel(options);
    FAIL();
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::invalid_url);
  }
  options.advertised_data_address.clear();
  options.peer_init_url = "tcp://127.0.0.1:70000";
  EXPECT_THROW(TcpTransferChannel channel(options), TransferError);
}

TEST(Construction, MemoryThatTcpCannotReachIsRefused) {
  std::vector<std::byte> memory(page_size);
  TcpOptions options;
  options.regions = {{memory.data(), memory.size(), page_size}};
  options.regions[0].dmabuf_fd = 0;
  try {
    TcpTransferChannel channel(options);
    FAIL();
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::not_supported);
    EXPECT_EQ(std::string(error.what()).find("page size"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("region 0"), std::string::npos) << error.what();
  }
}

TEST(ConnectFaults, Line09_UnknownAndFailedPeersAreDifferentErrors) {
  Node a(4, {}, false);
  std::error_code ec;
  a.channel->batched_write(a.pages(1), {.peer_id = "b", .remote_indexes = indexes(1)}, ec);
  EXPECT_EQ(ec, errc::unknown_peer);
  EXPECT_EQ(ec, condition::invalid_argument);
  std::optional<Node> b(std::in_place, 4);
  a.channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
  auto recv = a.channel->async_batched_recv(a.pages(1), {.peer_id = "b"}, asio::use_future);
  b.reset();
  try {
    recv.get();
    FAIL();
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code(), condition::peer_failed) << error.code().message();
    EXPECT_NE(error.code(), condition::invalid_argument);
  }
}

TEST(ConnectFaults, Line09_APassivePeerWithoutUrlFailsWithItsLastError) {
  Node b(4);
  std::optional<Node> a(std::in_place, 4, TcpOptions(), false);
  a->channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  auto recv = b.channel->async_batched_recv(b.pages(1), {.peer_id = "a"}, asio::use_future);
  a.reset();
  EXPECT_THROW(recv.get(), std::system_error);
  std::error_code ec;
  std::string diagnostic;
  b.channel->batched_write(b.pages(1), {.peer_id = "a", .remote_indexes = indexes(1), .diagnostic = &diagnostic}, ec);
  EXPECT_EQ(ec, condition::peer_failed) << ec.message();
  EXPECT_NE(diagnostic.find("init url is not known"), std::string::npos) << diagnostic;
}

TEST(ConnectFaults, ThePeerThatWentOutOfUseFirstIsForgottenFirst) {
  TcpOptions options;
  options.max_peers = 2;
  Node hub(1, options, false);
  TcpOptions own;
  own.peer_init_url = kvferry::testing::own_loopback_url();  // nobody else comes to where they have been
  Node first(1, own);
  Node second(1, own);
  Node third(1);
  hub.channel->lazy_init_peer_connection("hub", "first", first.channel->peer_init_url());
  hub.channel->lazy_init_peer_connection("hub", "second", second.channel->peer_init_url());
  for (Node* const gone : {&second, &first}) {
    const std::string id = gone == &second ? "second" : "first";
    auto unmet = hub.channel->async_batched_recv(hub.pages(1), {.peer_id = id}, asio::use_future);
    gone->channel->close();
    EXPECT_THROW(unmet.get(), std::system_error);  // the hub has noticed
  }
  hub.channel->lazy_init_peer_connection("hub", "third", third.channel->peer_init_url());
  const auto error_of_write_to = [&](const std::string& id) {
    std::error_code ec;
    hub.channel->batched_write(hub.pages(1),
                               {.peer_id = id, .remote_indexes = indexes(1), .timeout = milliseconds(100)}, ec);
    return ec;
  };
  EXPECT_EQ(error_of_write_to("second"), errc::unknown_peer);
  EXPECT_EQ(error_of_write_to("first"), condition::retryable) << "known, and tried";
}

}  // namespace
}  // namespace kvferry::tcp::testing
