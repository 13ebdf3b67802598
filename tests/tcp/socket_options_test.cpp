// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <system_error>

#include <kvferry/tcp/hello.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

int option(const asio::ip::tcp::socket& socket, int level, int name) {
  int value = -1;
  socklen_t size = sizeof(value);
  EXPECT_EQ(::getsockopt(const_cast<asio::ip::tcp::socket&>(socket).native_handle(), level, name, &value, &size), 0);
  return value;
}

TEST(SocketOptions, AreSetAsAskedForAndElseLeftAlone) {
  asio::io_context context;
  asio::ip::tcp::socket usual(context, asio::ip::tcp::v4());
  const asio::ip::tcp::socket untouched(context, asio::ip::tcp::v4());
  std::error_code ec;
  prepare_socket(usual, {}, ec);
  ASSERT_FALSE(ec);
  EXPECT_TRUE(usual.non_blocking());
  EXPECT_NE(option(usual, IPPROTO_TCP, TCP_NODELAY), 0);
  EXPECT_EQ(option(usual, SOL_SOCKET, SO_KEEPALIVE), 0);
  for (const int name : {SO_SNDBUF, SO_RCVBUF}) {
    EXPECT_EQ(option(usual, SOL_SOCKET, name), option(untouched, SOL_SOCKET, name));
  }
  EXPECT_EQ(option(usual, IPPROTO_TCP, TCP_USER_TIMEOUT), 0);

  SocketOptions options;
  options.send_buffer = 20'000;
  options.receive_buffer = 30'000;
  options.keepalive_idle = std::chrono::seconds(70);
  options.user_timeout = std::chrono::milliseconds(12'345);
  asio::ip::tcp::socket tuned(context, asio::ip::tcp::v4());
  prepare_socket(tuned, options, ec);
  ASSERT_FALSE(ec);
  // The kernel doubles what it is asked for (socket(7)).
  EXPECT_EQ(option(tuned, SOL_SOCKET, SO_SNDBUF), 40'000);
  EXPECT_EQ(option(tuned, SOL_SOCKET, SO_RCVBUF), 60'000);
  EXPECT_NE(option(tuned, SOL_SOCKET, SO_KEEPALIVE), 0);
  EXPECT_EQ(option(tuned, IPPROTO_TCP, TCP_KEEPIDLE), 70);
  EXPECT_EQ(option(tuned, IPPROTO_TCP, TCP_KEEPINTVL), 5);
  EXPECT_EQ(option(tuned, IPPROTO_TCP, TCP_KEEPCNT), 3);
  EXPECT_EQ(option(tuned, IPPROTO_TCP, TCP_USER_TIMEOUT), 12'345);
}

TEST(SocketOptions, AsLargeAsTheyAreAskedForAreAsLargeAsTheSystemAllows) {
  asio::io_context context;
  asio::ip::tcp::socket large(context, asio::ip::tcp::v4());
  asio::ip::tcp::socket larger(context, asio::ip::tcp::v4());
  std::error_code ec;
  SocketOptions options;
  options.send_buffer = std::size_t{1} << 30;
  options.receive_buffer = std::size_t{1} << 30;
  prepare_socket(large, options, ec);
  ASSERT_FALSE(ec);
  options.send_buffer = std::size_t{1} << 40;
  options.receive_buffer = std::size_t{1} << 40;
  options.keepalive_idle = std::chrono::hours(24 * 365);
  prepare_socket(larger, options, ec);
  ASSERT_FALSE(ec);
  for (const int name : {SO_SNDBUF, SO_RCVBUF}) {
    EXPECT_EQ(option(larger, SOL_SOCKET, name), option(large, SOL_SOCKET, name));
  }
  EXPECT_EQ(option(larger, IPPROTO_TCP, TCP_KEEPIDLE), 32767);
}

}  // namespace
}  // namespace kvferry::tcp
