// SPDX-License-Identifier: Apache-2.0
// Memory that is used up when a thread has something for another to do.
#include <gtest/gtest.h>

#include <fcntl.h>

#include <asio/any_io_executor.hpp>
#include <asio/bind_executor.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <future>
#include <memory>
#include <new>
#include <system_error>
#include <type_traits>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/tcp/lane.hpp>

#include "common/failing_allocations.hpp"
#include "writing_lane.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {
namespace {

/// Whether this thread can't have a handler posted.
thread_local bool posts_fail = false;

TEST(OutOfMemory, WhoCannotHaveAnotherThreadGoOnGoesOnItself) {
  WritingLane writing;
  posts_fail = true;
  std::uint64_t sent = 0;
  EXPECT_NO_THROW(sent = writing.sent_by_start());
  posts_fail = false;
  EXPECT_GT(sent, std::uint64_t{320} << 10) << "that is as much as it would send if another thread went on";
}

/// The result of a handler that was posted without memory; 0 if it wasn't called.
template <class Executor, class Run>
std::size_t posted_without_memory(const Executor& executor, const asio::any_io_executor& fallback, Run run) {
  std::promise<std::size_t> result;
  auto got = result.get_future();
  // It breaks its promise if it goes without having been called.
  auto handler = [result = std::move(result)](std::error_code, std::size_t count) mutable { result.set_value(count); };
  Completion completion = [&] {
    if constexpr (std::is_same_v<Executor, asio::any_io_executor>) {
      return Completion(std::move(handler), executor);
    } else {
      return Completion(asio::bind_executor(executor, std::move(handler)), fallback);
    }
  }();
  posts_fail = true;
  completion({}, 7);
  posts_fail = false;
  run();
  try {
    return got.get();
  } catch (const std::future_error&) {
    return 0;
  }
}

TEST(OutOfMemory, AHandlerIsPostedToAsiosExecutorsWithoutAny) {
  asio::io_context context;
  const auto run = [&] {
    context.restart();
    context.run();
  };
  const asio::any_io_executor any = context.get_executor();
  EXPECT_EQ(posted_without_memory(any, any, run), 7U) << "a channel's own threads";
  EXPECT_EQ(posted_without_memory(context.get_executor(), any, run), 7U);
  EXPECT_EQ(posted_without_memory(asio::make_strand(context), any, run), 7U);
  EXPECT_EQ(posted_without_memory(asio::any_io_executor(asio::make_strand(context)), any, run), 7U) << "a coroutine's";
  asio::thread_pool pool(1);
  const auto wait = [] {};
  EXPECT_EQ(posted_without_memory(pool.get_executor(), any, wait), 7U);
  EXPECT_EQ(posted_without_memory(asio::make_strand(pool), any, wait), 7U);
  EXPECT_EQ(posted_without_memory(asio::any_io_executor(pool.get_executor()), any, wait), 7U);
  pool.join();
}

TEST(OutOfMemory, ASocketThatNoLaneGetsIsClosed) {
  asio::io_context context;
  bool refused = true;
  for (std::size_t allocations = 0; refused; ++allocations) {
    ASSERT_LT(allocations, 100U);
    asio::ip::tcp::socket socket(context, asio::ip::tcp::v4());
    const int descriptor = socket.native_handle();
    test::allocation_refused = false;
    test::allocations_left = allocations;
    try {
      (void)connection_of(std::move(socket));
    } catch (const std::bad_alloc&) {
      // There is no connection.
    }
    test::allocations_left = test::unlimited_allocations;
    refused = test::allocation_refused;
    ASSERT_EQ(::fcntl(descriptor, F_GETFD), -1) << "with memory for " << allocations << " allocations";
  }
}

}  // namespace
}  // namespace kvferry::tcp::testing

/// Asio takes the memory of handlers from this function.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  void* block = nullptr;
  if (kvferry::tcp::testing::posts_fail || !kvferry::test::may_allocate() ||
      ::posix_memalign(&block, alignment, size) != 0) {
    return nullptr;
  }
  return block;
}
