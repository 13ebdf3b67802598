// SPDX-License-Identifier: Apache-2.0
#include "logging.hpp"

#include <fmt/format.h>
#include <kvferry/error.hpp>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <iterator>
#include <memory>
#include <string>

namespace example {
namespace {

spdlog::level::level_enum level_of(kvferry::LogLevel level) {
  switch (level) {
    case kvferry::LogLevel::debug: return spdlog::level::debug;
    case kvferry::LogLevel::info: return spdlog::level::info;
    case kvferry::LogLevel::warning: return spdlog::level::warn;
    case kvferry::LogLevel::error: return spdlog::level::err;
    case kvferry::LogLevel::off: break;
  }
  return spdlog::level::off;
}

}  // namespace

kvferry::LogSink log_to_spdlog() {
  const auto logger =
      std::make_shared<spdlog::logger>("kvferry", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_level(spdlog::level::trace);  // the channel has a level already
  return [logger](const kvferry::LogRecord& record) {
    std::string line = fmt::format("{}", record.event);
    const auto add = std::back_inserter(line);
    if (!record.transport.empty()) {
      fmt::format_to(add, " transport={}", record.transport);
    }
    if (!record.peer.empty()) {
      fmt::format_to(add, " peer=\"{}\"", record.peer);
    }
    if (record.cause) {
      fmt::format_to(add, " cause={}:{}", record.cause.category().name(), kvferry::error_name(record.cause));
    }
    if (record.suppressed != 0) {
      fmt::format_to(add, " suppressed={}", record.suppressed);
    }
    logger->log(level_of(record.level), "{}: {}", line, record.text);
  };
}

}  // namespace example
