// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/any_io_executor.hpp>
#include <asio/bind_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/experimental/as_tuple.hpp>
#include <asio/experimental/deferred.hpp>
#include <asio/io_context.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>
#include <asio/use_future.hpp>

#ifdef ASIO_HAS_CO_AWAIT
#include <asio/awaitable.hpp>
#include <asio/co_spawn.hpp>
#include <asio/experimental/awaitable_operators.hpp>
#include <asio/steady_timer.hpp>
#include <asio/this_coro.hpp>
#include <asio/use_awaitable.hpp>
#endif

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <memory_resource>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Counts its allocations.
template <class T>
struct CountingAllocator {
  using value_type = T;

  explicit CountingAllocator(std::shared_ptr<std::atomic<int>> counter) : count(std::move(counter)) {}
  template <class U>
  CountingAllocator(const CountingAllocator<U>& other) : count(other.count) {}

  T* allocate(std::size_t n) {
    ++*count;
    return std::allocator<T>().allocate(n);
  }
  void deallocate(T* pointer, std::size_t n) { std::allocator<T>().deallocate(pointer, n); }
  friend bool operator==(const CountingAllocator&, const CountingAllocator&) { return true; }

  std::shared_ptr<std::atomic<int>> count;
};

/// Memory that belongs to a handler, which knows how many blocks of it are in use.
struct HandlersMemory {
  std::atomic<int> blocks{0};
};

/// Allocates from a handler's memory.
template <class T>
struct HandlersAllocator {
  using value_type = T;

  explicit HandlersAllocator(HandlersMemory* given) : memory(given) {}
  template <class U>
  HandlersAllocator(const HandlersAllocator<U>& other) : memory(other.memory) {}

  T* allocate(std::size_t n) {
    T* const pointer = std::allocator<T>().allocate(n);
    ++memory->blocks;
    return pointer;
  }
  void deallocate(T* pointer, std::size_t n) {
    std::allocator<T>().deallocate(pointer, n);
    --memory->blocks;
  }
  template <class U>
  bool operator==(const HandlersAllocator<U>& other) const {
    return memory == other.memory;
  }

  HandlersMemory* memory;
};

/// Any completion token works: Asio's own, and all kinds of handlers.
class TokensTests : public ConformanceBase {
 protected:
  /// The spec of a write of two pages to `to`, which it refers to.
  [[nodiscard]] static TransferSpec two_pages(const Node& to) {
    static const std::vector<std::uint64_t> indexes{4, 2};
    TransferSpec spec = at(indexes);
    spec.peer_id = to.id();
    return spec;
  }
  [[nodiscard]] static TransferSpec missing_page(const Node& to) {
    static const std::vector<std::uint64_t> indexes{4, 999};
    TransferSpec spec = at(indexes);
    spec.peer_id = to.id();
    return spec;
  }

  void expect_two_pages(const Node& to, std::uint64_t seed) {
    EXPECT_TRUE(page_holds(to.page(4), 64, seed));
    EXPECT_TRUE(page_holds(to.page(2), 64, seed + 1));
  }

 public:
  void UseFuture() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(1);
    EXPECT_EQ(in_time(a->async_batched_write(objects.readable(), two_pages(b), asio::use_future)), 2U);
    expect_two_pages(b, 1);
    auto failing = a->async_batched_write(objects.readable(), missing_page(b), asio::use_future);
    try {
      in_time(failing);
      ADD_FAILURE() << "did not throw";
    } catch (const std::system_error& error) {
      EXPECT_EQ(error.code(), errc::index_out_of_range);
    }
  }

  void UseFutureForEverythingElse() {
    const auto [a, b] = pair();
    EXPECT_EQ(in_time(a->async_lazy_init_peer_connection(a.id(), b.id(), b.url(), {}, {}, asio::use_future)),
              std::nullopt);
    EXPECT_THROW(in_time(a->async_send_init_side_msg("nonsense", {}, {}, asio::use_future)), std::system_error);
    EXPECT_THROW(in_time(a->async_receive_notification(std::chrono::milliseconds(0), asio::use_future)),
                 std::system_error);
    expect_usable(a, b);
  }

  void AsTuple() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(2);
    using Result = std::tuple<std::error_code, std::size_t>;
    const auto result_of = [&, &from = a](const TransferSpec& spec) {
      std::promise<Result> promise;
      auto result = promise.get_future();
      from->async_batched_write(objects.readable(), spec,
                                asio::experimental::as_tuple([&](Result value) { promise.set_value(value); }));
      return in_time(result);
    };
    EXPECT_EQ(result_of(two_pages(b)), Result(std::error_code(), 2));
    expect_two_pages(b, 2);
    EXPECT_EQ(result_of(missing_page(b)), Result(errc::index_out_of_range, 0));
  }

  void DeferredStartsLaterWithCopiesOfTheSpec() {
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(notifications);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(3);
    auto operation = [&, &from = a, &to = b] {
      std::string peer = to.id();
      std::vector<std::uint64_t> indexes{4, 2};
      std::vector<std::byte> notification(5, std::byte{7});
      std::vector<MutableBuffer> buffers = objects.buffers();
      TransferSpec spec = at(indexes);
      spec.peer_id = peer;
      spec.notification = notification;
      auto result = from->async_batched_write(ConstObjects(buffers), spec, asio::experimental::deferred);
      peer.assign(peer.size(), '?');
      indexes.assign({98, 99});
      notification.assign(5, std::byte{8});
      buffers.assign(2, MutableBuffer());
      return result;
    }();
    EXPECT_TRUE(b.untouched());
    const auto transfer = watch<Transfer>("a deferred write", std::size_t{0});
    std::move(operation)(transfer->handler());
    EXPECT_EQ(transfer->outcome(), done(2));
    expect_two_pages(b, 3);
    EXPECT_EQ(std::get<1>(start_receive_notification(b)->results()).payload, std::vector<std::byte>(5, std::byte{7}));
  }

  void BoundExecutor() {
    const auto [a, b] = connected_pair();
    asio::io_context loop;
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      loop.restart();
      const auto transfer = start_adapted(kind, a, b.id(), Objects(), {},
                                          [&](auto handler) { return asio::bind_executor(loop, std::move(handler)); });
      // The pending operation is what keeps run_for from returning at once.
      EXPECT_EQ(loop.run_for(limit()), 1U);
      EXPECT_EQ(transfer->outcome(), done(0));
      EXPECT_EQ(transfer->thread(), std::this_thread::get_id());
    }
  }

  void BoundExecutorIsKeptBusyMeanwhile() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    asio::io_context loop;
    const auto receiving = start_adapted(TransferKind::recv, b, a.id(), b.objects({64}), tagged(1),
                                         [&](auto handler) { return asio::bind_executor(loop, std::move(handler)); });
    EXPECT_EQ(loop.poll(), 0U);
    EXPECT_FALSE(loop.stopped()) << "nothing keeps the handler's executor running while the operation is pending";
    const auto sending = start(TransferKind::send, a, b, a.objects({64}), tagged(1));
    EXPECT_EQ(loop.run_for(limit()), 1U);
    EXPECT_EQ(receiving->outcome(), done(1));
    EXPECT_EQ(sending->outcome(), done(1));
  }

  void MoveOnlyHandler() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(4);
    std::promise<std::size_t> promise;
    auto result = promise.get_future();
    a->async_batched_write(objects.readable(), two_pages(b),
                           [owned = std::make_unique<std::promise<std::size_t>>(std::move(promise))](
                               std::error_code, std::size_t count) { owned->set_value(count); });
    EXPECT_EQ(in_time(result), 2U);
  }

  void HandlerWithAnAllocator() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(5);
    asio::io_context loop;
    struct Handler {
      using allocator_type = CountingAllocator<std::byte>;
      using executor_type = asio::io_context::executor_type;
      [[nodiscard]] allocator_type get_allocator() const { return allocator; }
      [[nodiscard]] executor_type get_executor() const { return executor; }
      void operator()(std::error_code, std::size_t count) { result.set_value(count); }
      allocator_type allocator;
      // Not the channel's: what hides an executor's type hides that it takes an allocator.
      executor_type executor;
      std::promise<std::size_t> result;
    };
    const auto allocations = std::make_shared<std::atomic<int>>(0);
    Handler handler{CountingAllocator<std::byte>(allocations), loop.get_executor(), {}};
    auto result = handler.result.get_future();
    a->async_batched_write(objects.readable(), two_pages(b), std::move(handler));
    loop.run_for(limit());
    EXPECT_EQ(in_time(result), 2U);
    EXPECT_GT(allocations->load(), 0) << "the handler's allocator was not used to post it";
  }

  /// Asio's operations give it back before they call the handler, which may then free it.
  void HandlerFindsItsAllocatorsMemoryFree() {
    KVFERRY_TESTING_REQUIRE(write);
    const auto [a, b] = connected_pair();
    const Objects objects = a.objects({64, 64}).fill(6);
    // To the program's end: the thread that has posted a handler may let go of its strand after the handler has run.
    static asio::thread_pool pool(1);
    static asio::io_context loop;
    loop.restart();
    auto busy = asio::make_work_guard(loop);
    std::thread runs([] { loop.run(); });
    const auto blocks_in_use = [&, &from = a, &to = b](const auto& executor) {
      struct Handler {
        using allocator_type = HandlersAllocator<std::byte>;
        [[nodiscard]] allocator_type get_allocator() const { return allocator_type(memory.get()); }
        void operator()(std::error_code, std::size_t) { blocks.set_value(memory->blocks); }
        std::unique_ptr<HandlersMemory> memory = std::make_unique<HandlersMemory>();
        std::promise<int> blocks;
      };
      Handler handler;
      auto blocks = handler.blocks.get_future();
      from->async_batched_write(objects.readable(), two_pages(to), asio::bind_executor(executor, std::move(handler)));
      return in_time(blocks);
    };
    for (int i = 0; i < 100 && !HasFailure(); ++i) {
      EXPECT_EQ(blocks_in_use(pool.get_executor()), 0);
      EXPECT_EQ(blocks_in_use(asio::make_strand(pool)), 0);
      EXPECT_EQ(blocks_in_use(asio::any_io_executor(pool.get_executor())), 0);
      EXPECT_EQ(blocks_in_use(loop.get_executor()), 0);
      EXPECT_EQ(blocks_in_use(asio::any_io_executor(asio::make_strand(loop))), 0);
    }
    busy.reset();
    runs.join();
  }

  /// It owns the memory, and its executor never runs it.
  void HandlerThatNeverRunsGivesItsAllocatorsMemoryBack() {
    const auto [a, b] = connected_pair();
    struct Memory : std::pmr::monotonic_buffer_resource {
      explicit Memory(bool& given_back) : freed(given_back) {}
      void do_deallocate(void*, std::size_t, std::size_t) override { freed = true; }
      bool& freed;
    };
    struct Handler {
      using allocator_type = std::pmr::polymorphic_allocator<std::byte>;
      [[nodiscard]] allocator_type get_allocator() const { return {memory.get()}; }
      void operator()(std::error_code, const Notification&) const { ADD_FAILURE() << "it ran"; }
      std::unique_ptr<Memory> memory;
    };
    bool freed = false;
    {
      asio::io_context loop;
      a->async_receive_notification({}, asio::bind_executor(loop, Handler{std::make_unique<Memory>(freed)}));
      a->close();
    }
    EXPECT_TRUE(freed);
  }

  void Coroutine() {
#ifdef ASIO_HAS_CO_AWAIT
    KVFERRY_TESTING_REQUIRE(write);
    KVFERRY_TESTING_REQUIRE(read);
    const auto [a, b] = pair();
    const Objects source = a.objects({64, 64}).fill(6);
    const Objects target = a.objects({64, 64});
    asio::io_context loop;
    // Parameters, because a lambda's captures are gone when its coroutine goes on.
    auto work = [](Node& from, Node& to, Objects out, Objects in,
                   std::thread::id here) -> asio::awaitable<std::size_t> {
      const std::string url = to.url();
      co_await from->async_lazy_init_peer_connection(from.id(), to.id(), url, {}, {}, asio::use_awaitable);
      const TransferSpec spec = two_pages(to);
      std::size_t total = co_await from->async_batched_write(out.readable(), spec, asio::use_awaitable);
      total += co_await from->async_batched_read(in.writable(), spec, asio::use_awaitable);
      EXPECT_EQ(std::this_thread::get_id(), here);
      const auto [error, count] = co_await from->async_batched_write(out.readable(), missing_page(to),
                                                                     asio::experimental::as_tuple(asio::use_awaitable));
      EXPECT_EQ(error, errc::index_out_of_range);
      EXPECT_EQ(count, 0U);
      co_return total;
    };
    auto result = asio::co_spawn(loop, work(a, b, source, target, std::this_thread::get_id()), asio::use_future);
    loop.run_for(limit());
    EXPECT_EQ(in_time(result), 4U);
    EXPECT_TRUE(target.match(6));
    expect_two_pages(b, 6);
#else
    GTEST_SKIP() << "Asio has no coroutines with this compiler";
#endif
  }

  void CoroutineWithATimer() {
#ifdef ASIO_HAS_CO_AWAIT
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects target = a.objects({64});
    asio::io_context loop;
    auto work = [](Node& to, Node& from, Objects objects) -> asio::awaitable<std::size_t> {
      using asio::experimental::awaitable_operators::operator||;
      asio::steady_timer timer(co_await asio::this_coro::executor, std::chrono::milliseconds(50));
      const auto first =
          co_await (to->async_batched_recv(objects.writable(), {.peer_id = from.id()}, asio::use_awaitable) ||
                    timer.async_wait(asio::use_awaitable));
      co_return first.index();
    };
    auto result = asio::co_spawn(loop, work(a, b, target), asio::use_future);
    loop.run_for(limit());
    EXPECT_EQ(in_time(result), 1U) << "the timer is to be first";
    // The recv has been cancelled: it does not meet this.
    const Objects other = a.objects({64});
    const auto receiving = start(TransferKind::recv, a, b, other);
    EXPECT_EQ(start(TransferKind::send, b, a, b.objects({64}).fill(7))->outcome(), done(1));
    EXPECT_EQ(receiving->outcome(), done(1));
    EXPECT_TRUE(other.match(7));
    EXPECT_TRUE(target.untouched());
#else
    GTEST_SKIP() << "Asio has no coroutines with this compiler";
#endif
  }
};

KVFERRY_TESTING_SUITE(TokensTest, TokensTests, UseFuture, UseFutureForEverythingElse, AsTuple,
                      DeferredStartsLaterWithCopiesOfTheSpec, BoundExecutor, BoundExecutorIsKeptBusyMeanwhile,
                      MoveOnlyHandler, HandlerWithAnAllocator, HandlerFindsItsAllocatorsMemoryFree,
                      HandlerThatNeverRunsGivesItsAllocatorsMemoryBack, Coroutine, CoroutineWithATimer);

}  // namespace kvferry::testing
