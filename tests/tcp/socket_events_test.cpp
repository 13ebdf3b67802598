// SPDX-License-Identifier: Apache-2.0
// Events of sockets are reported, and none is lost for want of memory.
#include <kvferry/tcp/socket_events.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <new>
#include <system_error>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

/// Counts, and stops who runs the context.
class CountingListener final : public SocketEvents::Listener {
 public:
  explicit CountingListener(asio::io_context& context) : context_(context) {}
  void socket_ready(bool readable, bool, bool) override {
    readable_ += readable ? 1 : 0;
    context_.stop();
  }
  [[nodiscard]] int readable() const noexcept { return readable_; }

 private:
  asio::io_context& context_;
  int readable_ = 0;
};

TEST(SocketEvents, NeedNoMemoryToGoOn) {
  asio::io_context context;
  const auto events = std::make_shared<SocketEvents>(context.get_executor());
  std::array<int, 2> ends{};
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
  const auto listener = std::make_shared<CountingListener>(context);
  std::error_code ec;
  events->add(ends[0], listener, ec);
  ASSERT_FALSE(ec);
  ASSERT_EQ(::write(ends[1], "x", 1), 1);
  for (int round = 1; round <= 3; ++round) {
    events->arm(ends[0], EPOLLIN, ec);
    ASSERT_FALSE(ec);
    // Asio's thread keeps the blocks of the last two handlers. These are too small for a wait.
    asio::post(context, [] {});
    asio::post(context, [] {});
    context.restart();
    test::allocations_left = 0;
    try {
      context.poll();  // of all of them at once
    } catch (const std::bad_alloc&) {
      // as one of a channel's threads would go on
    }
    test::allocations_left = test::unlimited_allocations;
    ASSERT_EQ(listener->readable(), round);
  }
  events->close();
  ::close(ends[0]);
  ::close(ends[1]);
}

}  // namespace
}  // namespace kvferry::tcp
