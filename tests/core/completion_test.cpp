// SPDX-License-Identifier: Apache-2.0
#include <kvferry/completion.hpp>

#include <gtest/gtest.h>

#include <asio/bind_executor.hpp>
#include <asio/execution/blocking.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/log.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

/// What is logged while it lives.
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
  auto handler =
      Completion::direct([](std::error_code, std::size_t) { throw std::runtime_error("a handler's own trouble"); });
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

/// Throws so many times before it posts.
class WithoutMemory {
 public:
  WithoutMemory(asio::io_context& context, int& failures) : context_(&context), failures_(&failures) {}

  template <class Function>
  void execute(Function&& function) const {
    // Takes the function along, as an executor does that has moved it when it finds no memory.
    auto taken = std::forward<Function>(function);
    if (*failures_ > 0) {
      --*failures_;
      throw std::bad_alloc();
    }
    asio::post(*context_, std::move(taken));
  }
  [[nodiscard]] WithoutMemory require(asio::execution::blocking_t::never_t /*never*/) const noexcept { return *this; }
  bool operator==(const WithoutMemory&) const = default;

 private:
  asio::io_context* context_;
  int* failures_;
};

TEST(CompletionHandler, IsPostedOnceThereIsMemory) {
  asio::io_context context;
  int failures = 5;
  std::size_t count = 0;
  auto state = std::make_unique<int>(7);  // what can only be moved can't be copied for another try
  Completion handler(asio::bind_executor(WithoutMemory(context, failures),
                                         [&count, state = std::move(state)](std::error_code, std::size_t transferred) {
                                           count = transferred + static_cast<std::size_t>(*state);
                                         }),
                     context.get_executor());
  handler({}, 1);
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(count, 0U) << "it ran inside the call";
  context.run();
  EXPECT_EQ(count, 8U);
}

TEST(CompletionHandler, IsDroppedAndLoggedWhereMemoryStaysUsedUp) {
  Log log;
  asio::io_context context;
  int failures = 1'000'000;
  bool ran = false;
  Completion handler(
      asio::bind_executor(WithoutMemory(context, failures), [&ran](std::error_code, std::size_t) { ran = true; }),
      context.get_executor());
  handler({}, 1);
  EXPECT_EQ(log.events, std::vector<std::string>{"exception_dropped"});
  context.run();
  EXPECT_FALSE(ran);
}

TEST(CompletionHandler, EndsWhereItRuns) {
  asio::io_context context;
  std::thread::id ended;
  const std::shared_ptr<void> state(nullptr, [&ended](void*) { ended = std::this_thread::get_id(); });
  {
    Completion handler([held = state](std::error_code, std::size_t) {}, context.get_executor());
    handler({}, 1);
  }
  std::thread runs([&context, &state] {
    context.run();
    EXPECT_EQ(state.use_count(), 1) << "the handler has not ended with its call";
  });
  runs.join();
}

}  // namespace
}  // namespace kvferry
