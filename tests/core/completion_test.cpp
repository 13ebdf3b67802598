// SPDX-License-Identifier: Apache-2.0
#include <kvferry/completion.hpp>

#include <gtest/gtest.h>

#include <asio/bind_executor.hpp>
#include <asio/execution/blocking.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/log.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

/// The records that are logged while it lives.
class Log {
 public:
  Log() {
    set_log_sink([this](const LogRecord& record) {
      events.emplace_back(record.event);
      texts.emplace_back(record.text);
    });
  }
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;
  ~Log() { set_log_sink({}); }

  std::vector<std::string> events;
  std::vector<std::string> texts;
};

TEST(CompletionHandler, WhatADirectOneThrowsIsLoggedAndDropped) {
  Log log;
  auto handler = Completion::direct(
      [](std::error_code, std::size_t) { throw std::runtime_error("a handler's own trouble"); });
  EXPECT_NO_THROW(handler({}, 1));
  ASSERT_EQ(log.events, std::vector<std::string>{"exception_dropped"});
  EXPECT_NE(log.texts.front().find("a handler's own trouble"), std::string::npos) << log.texts.front();
}

TEST(CompletionHandler, WhatOneThrowsComesOutOfItsExecutorsRun) {
  asio::io_context context;
  Completion handler([](std::error_code, std::size_t) { throw std::runtime_error("a handler's own trouble"); },
                     context.get_executor());
  handler({}, 1);
  EXPECT_THROW(context.run(), std::runtime_error);
}

/// An executor that has no memory so many times: before it has taken a function for good, or behind that.
struct WithoutMemory {
  template <class Function>
  void execute(Function&& function) const {
    // Takes the function along, as an executor does that has moved it when it finds no memory.
    auto taken = std::forward<Function>(function);
    const bool fails = *failures > 0;
    if (fails) {
      --*failures;
    }
    if (!fails || keeps) {
      asio::post(*context, std::move(taken));
    }
    if (fails) {
      throw std::bad_alloc();
    }
  }
  [[nodiscard]] WithoutMemory require(asio::execution::blocking_t::never_t /*never*/) const noexcept { return *this; }
  bool operator==(const WithoutMemory&) const = default;

  asio::io_context* context;
  int* failures;
  bool keeps = false;
};

TEST(CompletionHandler, IsPostedOnceThereIsMemory) {
  for (const bool keeps : {false, true}) {
    asio::io_context context;
    int failures = 5;
    std::vector<std::size_t> counts;
    auto state = std::make_unique<int>(7);  // what can only be moved can't be copied for another try
    Completion handler(
        asio::bind_executor(WithoutMemory{&context, &failures, keeps},
                            [&counts, state = std::move(state)](std::error_code, std::size_t transferred) {
                              counts.push_back(transferred + static_cast<std::size_t>(*state));
                            }),
        context.get_executor());
    handler({}, 1);
    EXPECT_EQ(failures, 0);
    EXPECT_TRUE(counts.empty()) << "it ran inside the call";
    context.run();
    EXPECT_EQ(counts, std::vector<std::size_t>{8})
        << (keeps ? "the executor kept what it failed at" : "it had failed before");
  }
}

TEST(CompletionHandler, IsDroppedAndLoggedWhereMemoryStaysUsedUp) {
  Log log;
  asio::io_context context;
  int failures = 1'000'000;
  bool ran = false;
  Completion handler(
      asio::bind_executor(WithoutMemory{&context, &failures}, [&ran](std::error_code, std::size_t) { ran = true; }),
      context.get_executor());
  handler({}, 1);
  EXPECT_EQ(log.events, std::vector<std::string>{"exception_dropped"});
  context.run();
  EXPECT_FALSE(ran);
}

TEST(CompletionHandler, EndsWhereItRunsAlsoIfItCanOnlyBeCopied) {
  asio::io_context context;
  std::thread::id ended;
  auto owned =
      std::make_unique<std::shared_ptr<void>>(nullptr, [&ended](void*) { ended = std::this_thread::get_id(); });
  const std::weak_ptr<void> seen = *owned;
  // A constant capture is copied where the closure is moved.
  Completion handler([state = std::as_const(*owned)](std::error_code, std::size_t) {}, context.get_executor());
  owned.reset();
  handler({}, 1);
  std::thread::id runner;
  std::thread([&] {
    runner = std::this_thread::get_id();
    context.run();
    EXPECT_TRUE(seen.expired()) << "something of the handler is left when it has run";
  }).join();
  EXPECT_EQ(ended, runner);
}

TEST(CompletionHandler, EndsWithItsExecutor) {
  std::optional<asio::io_context> context(std::in_place);
  auto state = std::make_shared<int>(7);
  const std::weak_ptr<int> seen = state;
  Completion handler([state = std::move(state)](std::error_code, std::size_t) {}, context->get_executor());
  handler({}, 1);
  EXPECT_FALSE(seen.expired());
  context.reset();
  EXPECT_TRUE(seen.expired());
}

}  // namespace
}  // namespace kvferry
