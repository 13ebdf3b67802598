// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <asio/any_io_executor.hpp>
#include <asio/execution/blocking.hpp>
#include <asio/execution/context.hpp>
#include <asio/execution/outstanding_work.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/require.hpp>
#include <asio/strand.hpp>
#include <asio/system_executor.hpp>
#include <asio/thread_pool.hpp>

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include "channel_pair.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using testing::indexes;
using testing::Node;

/// An executor of the user's own, in whose place Asio's would have a pointer that is none here.
class OwnExecutor {
 public:
  explicit OwnExecutor(asio::io_context& context) : context_(&context) {}

  template <class Function>
  void execute(Function&& function) const {
    asio::post(*context_, std::forward<Function>(function));
  }
  [[nodiscard]] asio::execution_context& query(asio::execution::context_t /*unused*/) const noexcept {
    return *context_;
  }
  [[nodiscard]] static constexpr asio::execution::blocking_t query(asio::execution::blocking_t /*unused*/) noexcept {
    return asio::execution::blocking.never;
  }
  friend bool operator==(const OwnExecutor& a, const OwnExecutor& b) noexcept { return a.context_ == b.context_; }
  friend bool operator!=(const OwnExecutor& a, const OwnExecutor& b) noexcept { return !(a == b); }

 private:
  [[maybe_unused]] std::uintptr_t no_pointer_ = 1;
  asio::io_context* context_;
};

/// More than an asynchronous call sends at once where it isn't known to be on a thread of the executor.
constexpr std::size_t executors_pages = (std::size_t{1} << 20) / testing::page_size;

/// Two channels on the user's executor.
struct Pair {
  explicit Pair(const asio::any_io_executor& executor)
      : a(executors_pages, on(executor)), b(executors_pages, on(executor)) {
    a.channel->lazy_init_peer_connection("a", "b", b.channel->peer_init_url());
  }
  [[nodiscard]] static TcpOptions on(const asio::any_io_executor& executor) {
    TcpOptions options;
    options.executor = executor;
    return options;
  }
  [[nodiscard]] std::error_code write(unsigned seed) {
    a.fill(seed);
    std::error_code ec;
    a.channel->batched_write(a.pages(executors_pages), {.peer_id = "b", .remote_indexes = indexes(executors_pages)},
                             ec);
    return ec;
  }

  Node a;
  Node b;
};

void expect_to_work(Pair& pair) {
  EXPECT_FALSE(pair.write(1));
  EXPECT_EQ(pair.a.memory, pair.b.memory);
  pair.a.fill(2);
  EXPECT_EQ(pair.a.channel
                ->async_batched_write(pair.a.pages(executors_pages),
                                      {.peer_id = "b", .remote_indexes = indexes(executors_pages)}, asio::use_future)
                .get(),
            executors_pages);
  EXPECT_EQ(pair.a.memory, pair.b.memory);
}

[[nodiscard]] std::error_code written_on(const asio::any_io_executor& executor, Pair& pair) {
  std::promise<std::error_code> end;
  asio::post(executor, [&] { end.set_value(pair.write(3)); });
  return end.get_future().get();
}

struct RunContext {
  ~RunContext() {
    work.reset();
    thread.join();
  }
  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  std::thread thread{[this] { context.run(); }};
};

TEST(Executors, OfOneThreadRefuseBlockingCallsThere) {
  RunContext run;
  asio::thread_pool pool(1);
  const auto tracked = asio::execution::outstanding_work.tracked;
  for (const asio::any_io_executor& executor :
       {asio::any_io_executor(run.context.get_executor()), asio::any_io_executor(asio::make_strand(run.context)),
        asio::any_io_executor(pool.get_executor()), asio::any_io_executor(asio::make_strand(pool)),
        asio::any_io_executor(asio::make_strand(asio::any_io_executor(pool.get_executor()))),
        asio::any_io_executor(asio::require(run.context.get_executor(), tracked)),
        asio::any_io_executor(asio::require(pool.get_executor(), tracked)),
        asio::any_io_executor(asio::make_strand(asio::require(pool.get_executor(), tracked))),
        asio::any_io_executor(asio::make_strand(asio::make_strand(run.context)))}) {
    Pair pair(executor);
    expect_to_work(pair);
    EXPECT_EQ(written_on(executor, pair), errc::would_deadlock);
    expect_to_work(pair);
  }
  pool.join();
}

TEST(Executors, OfOneThreadLetOthersCallWhileTheyRunSomethingElse) {
  RunContext run;
  asio::thread_pool other(1);
  Pair pair(run.context.get_executor());
  EXPECT_FALSE(written_on(other.get_executor(), pair));
  EXPECT_EQ(pair.a.memory, pair.b.memory);
  other.join();
}

TEST(Executors, OfUnknownTypesWork) {
  RunContext run;
  for (const asio::any_io_executor& executor :
       {asio::any_io_executor(OwnExecutor(run.context)), asio::any_io_executor(asio::system_executor())}) {
    Pair pair(executor);
    expect_to_work(pair);
  }
}

}  // namespace
}  // namespace kvferry::tcp
