// SPDX-License-Identifier: Apache-2.0
#include <kvferry/completion_queue.hpp>

#include <gtest/gtest.h>

#include <asio/system_executor.hpp>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

using StringCompletion = CompletionHandler<void(std::error_code, std::string)>;

/// An operation whose end is up to the test.
template <class Handler, class Token>
auto start(std::optional<Handler>& started, Token&& token) {
  return [&]<class... Args>(std::type_identity<CompletionHandler<void(Args...)>>) {
    return asio::async_initiate<Token, void(Args...)>(
        [&](auto&& handler) {
          started.emplace(std::forward<decltype(handler)>(handler), asio::any_io_executor(asio::system_executor()));
        },
        token);
  }(std::type_identity<Handler>());
}

TEST(CompletionQueue, WritesToItsDescriptorOnceForManyEntries) {
  CompletionQueue queue;
  for (std::uint64_t i = 0; i < 100; ++i) {
    std::optional<Completion> operation;
    (void)start(operation, queue.token(i));
    (*operation)({}, i);
  }
  std::uint64_t written = 0;
  ASSERT_EQ(::read(queue.descriptor(), &written, sizeof(written)), static_cast<ssize_t>(sizeof(written)));
  EXPECT_EQ(written, 1U);
  std::array<CompletionEntry, 200> entries;
  ASSERT_EQ(queue.drain(entries), 100U);
  EXPECT_EQ(entries[99].user_data, 99U);
  EXPECT_EQ(entries[99].count, 99U);
}

TEST(CompletionQueue, AWaitEndsWithTheFirstEntryOrItsTime) {
  using std::chrono::milliseconds;
  CompletionQueue queue;
  std::array<CompletionEntry, 4> entries;
  EXPECT_EQ(queue.wait(entries, milliseconds(0)), 0U);
  EXPECT_EQ(queue.wait(entries, milliseconds(-5)), 0U);
  EXPECT_EQ(queue.wait(entries, milliseconds::min()), 0U);
  EXPECT_EQ(queue.wait({}), 0U) << "no place for an entry: waiting would have no end";
  const auto begun = std::chrono::steady_clock::now();
  EXPECT_EQ(queue.wait(entries, milliseconds(20)), 0U);
  EXPECT_GE(std::chrono::steady_clock::now() - begun, milliseconds(20));
  for (const std::optional<milliseconds> timeout : {std::optional<milliseconds>(), {milliseconds::max()}, {std::chrono::hours(24 * 300)}}) {
    std::optional<Completion> operation;
    (void)start(operation, queue.token(7));
    std::thread ends([&] { (*operation)({}, 1); });
    ASSERT_EQ(queue.wait(entries, timeout), 1U);
    EXPECT_EQ(entries[0].user_data, 7U);
    ends.join();
  }
}

TEST(CompletionQueue, ThreadsThatWaitShareWhatEnds) {
  constexpr std::uint64_t count = 200;
  CompletionQueue queue;
  std::atomic<std::uint64_t> taken{0};
  std::vector<std::thread> waiting;
  for (int i = 0; i < 3; ++i) {
    waiting.emplace_back([&] {
      std::array<CompletionEntry, 1> entry;
      while (queue.wait(entry) == 1 && entry[0].user_data != count) {
        ++taken;
      }
    });
  }
  for (std::uint64_t i = 0; i < count + waiting.size(); ++i) {
    std::optional<Completion> operation;
    (void)start(operation, queue.token(std::min(i, count)));  // the last ones end a thread each
    (*operation)({}, 0);
  }
  for (auto& thread : waiting) {
    thread.join();
  }
  EXPECT_EQ(taken, count);
}

TEST(CompletionQueue, AResultIsThereWithItsEntryAndNotWrittenWhenTheQueueIsGone) {
  std::string result = "before";
  std::optional<StringCompletion> operation;
  OperationHandle handle;
  {
    CompletionQueue queue;
    handle = start(operation, queue.token(1, result));
    (*operation)({}, "five!");
    EXPECT_EQ(result, "five!");
    EXPECT_EQ(handle.result().value().count, 5U);
    handle = start(operation, queue.token(2, result));
  }
  (*operation)({}, "later");
  EXPECT_EQ(result, "five!");
  EXPECT_TRUE(handle.ended());
}

TEST(CompletionQueue, ACancellationGoesToTheOperationUntilItHasEnded) {
  CompletionQueue queue;
  std::optional<Completion> operation;
  const OperationHandle handle = start(operation, queue.token(1));
  ASSERT_TRUE(operation->cancellable());
  int cancelled = 0;
  operation->on_cancel([&](asio::cancellation_type) { ++cancelled; });
  handle.cancel();
  EXPECT_EQ(cancelled, 1);
  EXPECT_FALSE(handle.ended());
  (*operation)(errc::cancelled, 0);
  handle.cancel();
  EXPECT_EQ(cancelled, 1);
  EXPECT_EQ(handle.result().value().error, errc::cancelled);
}

TEST(CompletionQueue, LetsGoOfAMillionEntriesOneByOne) {
  for (const bool drained : {false, true}) {
    CompletionQueue queue;
    for (std::uint64_t i = 0; i < 1'000'000; ++i) {
      std::optional<Completion> operation;
      (void)start(operation, queue.token(i));
      (*operation)({}, 0);
    }
    if (drained) {
      std::vector<CompletionEntry> entries(1'000'000);
      EXPECT_EQ(queue.drain(entries), entries.size());
    }
  }
}

}  // namespace
}  // namespace kvferry
