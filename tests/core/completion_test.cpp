// SPDX-License-Identifier: Apache-2.0
#include <kvferry/completion.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <stdexcept>
#include <string>
#include <system_error>
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

}  // namespace
}  // namespace kvferry
