// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/logger.hpp>
#include <kvferry/log.hpp>

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <regex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/error.hpp>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

/// A record without views.
struct Kept {
  LogLevel level;
  std::string event;
  std::string transport;
  std::string peer;
  std::error_code cause;
  std::string text;
  std::uint64_t suppressed;
};

class Records {
 public:
  [[nodiscard]] LogSink sink() {
    return [this](const LogRecord& record) {
      const std::lock_guard lock(mutex_);
      kept_.push_back({record.level, std::string(record.event), std::string(record.transport), std::string(record.peer),
                       record.cause, std::string(record.text), record.suppressed});
    };
  }
  [[nodiscard]] std::vector<Kept> taken() {
    const std::lock_guard lock(mutex_);
    return std::exchange(kept_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<Kept> kept_;
};

/// The process's sink, put back to what a test may leave behind: nothing is written.
class ProcessSink : public ::testing::Test {
 protected:
  ~ProcessSink() override { set_log_sink({}); }
};

TEST(Log, ARecordNamesPeerTransportAndCause) {
  Records records;
  kit::Logger logger(records.sink());
  logger.set_transport("tcp");
  logger.log(LogLevel::warning, "peer_refused", "decode-3", errc::page_size_mismatch, [] { return "4096 and 8192"; });
  const auto kept = records.taken();
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(kept[0].level, LogLevel::warning);
  EXPECT_EQ(kept[0].event, "peer_refused");
  EXPECT_EQ(kept[0].transport, "tcp");
  EXPECT_EQ(kept[0].peer, "decode-3");
  EXPECT_EQ(kept[0].cause, errc::page_size_mismatch);
  EXPECT_EQ(kept[0].text, "4096 and 8192");
}

TEST(Log, ATextIsNotMadeForARecordThatNobodyWants) {
  Records records;
  kit::Logger logger(records.sink(), LogLevel::warning);
  logger.log(LogLevel::info, "event", "peer", {}, []() -> std::string { throw std::logic_error("made"); });
  EXPECT_FALSE(logger.enabled(LogLevel::info));
  EXPECT_TRUE(logger.enabled(LogLevel::warning));
  EXPECT_TRUE(records.taken().empty());

  kit::Logger silent(records.sink(), LogLevel::off);
  EXPECT_FALSE(silent.enabled(LogLevel::error));
  EXPECT_FALSE(silent.enabled(LogLevel::off));
}

TEST(Log, WhatIsNotLoggedAllocatesNothing) {
  kit::Logger warnings([](const LogRecord&) {}, LogLevel::warning);
  const auto text = [] { return std::string(100, 'x'); };
  for (int i = 0; i < 10; ++i) {
    warnings.log(LogLevel::warning, "often", "peer", errc::timed_out, text);
  }
  test::allocation_refused = false;
  test::allocations_left = 0;
  warnings.log(LogLevel::info, "event", "peer", errc::timed_out, text);     // below the level
  warnings.log(LogLevel::warning, "often", "peer", errc::timed_out, text);  // too often
  const bool allocated = test::allocation_refused;
  warnings.log(LogLevel::warning, "seldom", "peer", errc::timed_out, text);
  const bool counted = test::allocation_refused;
  test::allocations_left = test::unlimited_allocations;
  EXPECT_FALSE(allocated);
  EXPECT_TRUE(counted) << "one that is logged does";
}

TEST(Log, TheSameIsNotRepeatedWithoutEnd) {
  Records records;
  kit::Logger logger(records.sink());
  for (int i = 0; i < 1000; ++i) {
    logger.log(LogLevel::warning, "flood", "stranger", errc::resource_limit, [] { return "full"; });
  }
  EXPECT_EQ(records.taken().size(), 10U);
  // Another cause and another event are not the same.
  logger.log(LogLevel::warning, "flood", "stranger", errc::timed_out, [] { return "late"; });
  logger.log(LogLevel::warning, "other", "stranger", errc::resource_limit, [] { return "full"; });
  EXPECT_EQ(records.taken().size(), 2U);
}

TEST(Log, ALaterRecordTellsHowManyWereLeftOut) {
  Records records;
  kit::Logger logger(records.sink(), LogLevel::info, std::chrono::milliseconds(20));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::uint64_t tried = 0;
  std::uint64_t logged = 0;
  std::uint64_t suppressed = 0;
  while (suppressed == 0 && std::chrono::steady_clock::now() < deadline) {
    ++tried;
    logger.log(LogLevel::warning, "flood", "stranger", errc::resource_limit, [] { return "full"; });
    for (const auto& kept : records.taken()) {
      ++logged;
      suppressed += kept.suppressed;
    }
  }
  EXPECT_GT(suppressed, 0U);
  EXPECT_EQ(logged + suppressed, tried);
}

TEST(LogDeathTest, UntilASinkIsSetWarningsGoToTheStandardErrorOutput) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        kit::Logger logger;
        logger.log(LogLevel::info, "not_wanted", {}, {}, [] { return "text"; });
        logger.log(LogLevel::warning, "wanted", "decode", {}, [] { return "text"; });
        std::_Exit(logger.enabled(LogLevel::info) ? 1 : 0);
      },
      ::testing::ExitedWithCode(0), "^kvferry warning wanted peer .decode.: text\n$");
}

/// In a child of its own, whose standard error output is a pipe: logs a warning as long as no sink has been set.
void log_to_a_pipe(bool read, bool full) {
  ::alarm(60);
  std::array<int, 2> pipe{};
  if (::pipe(pipe.data()) != 0) {
    std::_Exit(2);
  }
  if (full) {
    ::fcntl(pipe[1], F_SETFL, O_NONBLOCK);
    while (::write(pipe[1], "x", 1) == 1) {
    }
    ::fcntl(pipe[1], F_SETFL, 0);
  }
  if (!read) {
    ::close(pipe[0]);
  }
  ::dup2(pipe[1], STDERR_FILENO);
  ::signal(SIGPIPE, SIG_DFL);
  kit::Logger logger;
  logger.log(LogLevel::warning, "peer_lost", {}, errc::peer_closed, [] { return "gone"; });
  std::_Exit(0);
}

TEST(LogDeathTest, AStandardErrorOutputThatNobodyReadsEndsNoProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(log_to_a_pipe(false, false), ::testing::ExitedWithCode(0), "");
}

TEST(LogDeathTest, AStandardErrorOutputThatIsFullHoldsNobodyUp) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(log_to_a_pipe(true, true), ::testing::ExitedWithCode(0), "");
}

TEST(Log, ASinkThatThrowsDisturbsNobody) {
  kit::Logger logger([](const LogRecord&) { throw std::runtime_error("disk full"); });
  logger.log(LogLevel::error, "event", {}, {}, [] { return "text"; });
  kit::Logger fine([](const LogRecord&) {});
  fine.log(LogLevel::error, "event", {}, {}, []() -> std::string { throw std::bad_alloc(); });
}

TEST(Log, WhatAPeerChoseCannotBreakALine) {
  Records records;
  kit::Logger logger(records.sink());
  logger.log(LogLevel::info, "event", std::string_view("a\nb\x1b[31m\0\"", 10), {},
             [] { return "peer 'x\r\ny' said so"; });
  const auto kept = records.taken();
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(kept[0].peer, "a\\x0ab\\x1b[31m\\x00\\x22");
  EXPECT_EQ(kept[0].text, "peer 'x\\x0d\\x0ay' said so");
}

TEST(Log, PrintableKeepsTextAndEscapesTheRest) {
  EXPECT_EQ(printable("décode 世界"), "décode 世界");
  EXPECT_EQ(printable("\xff\xc3"), "\\xff\\xc3");           // no UTF-8
  EXPECT_EQ(printable("\xc0\xaf"), "\\xc0\\xaf");           // "/" written longer than need be
  EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");  // a surrogate
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m"),
            "\\xc2\\x9b31m");  // a control character of two bytes
  EXPECT_EQ(printable("a'\"\\"), "a\\x27\\x22\\x5c");
  EXPECT_EQ(printable(std::string(100, 'x')), std::string(100, 'x'));
  EXPECT_EQ(printable(std::string(101, 'x')), std::string(100, 'x') + "...");
  EXPECT_EQ(printable(std::string(99, 'x') + "é"), std::string(99, 'x') + "...");  // not cut in two
  EXPECT_EQ(printable("", 0), "");
}

TEST(Log, ALineHasEverything) {
  LogRecord record;
  record.level = LogLevel::warning;
  record.event = "handshake_refused";
  record.transport = "tcp";
  record.peer = "decode-3";
  record.cause = errc::page_size_mismatch;
  record.text = "another page size";
  record.suppressed = 7;
  EXPECT_EQ(to_string(record), "kvferry warning handshake_refused tcp peer \"decode-3\": another page size "
                               "[kvferry:page_size_mismatch] (7 more like this were left out)");
  record = {};
  record.event = "channel_opened";
  record.text = "x";
  EXPECT_EQ(to_string(record), "kvferry info channel_opened: x");
}

TEST_F(ProcessSink, GetsWhatHasNoSinkOfItsOwn) {
  Records process;
  Records own;
  kit::Logger logger;
  kit::Logger apart(own.sink());
  set_log_sink(process.sink(), LogLevel::debug);
  logger.log(LogLevel::debug, "one", {}, {}, [] { return "1"; });
  apart.log(LogLevel::warning, "two", {}, {}, [] { return "2"; });
  set_log_sink({});
  EXPECT_FALSE(logger.enabled(LogLevel::error));
  logger.log(LogLevel::error, "three", {}, {}, [] { return "3"; });
  const auto kept = process.taken();
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(kept[0].event, "one");
  EXPECT_EQ(own.taken().size(), 1U);
}

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The names that a file has in calls of `log`, before the function that makes the text.
void add_events_in(const std::string& source, std::set<std::string>& events) {
  const std::regex name("\"([a-z]+(_[a-z]+)+)\"");
  for (auto call = source.find("log("); call != std::string::npos; call = source.find("log(", call + 1)) {
    const auto text = source.find('[', call);
    if (text == std::string::npos || source.find(';', call) < text) {
      continue;
    }
    const std::string arguments = source.substr(call, text - call);
    for (std::sregex_iterator it(arguments.begin(), arguments.end(), name); it != std::sregex_iterator(); ++it) {
      events.insert((*it)[1]);
    }
  }
}

TEST(LogEvents, AreThoseThatTheGuideLists) {
  const std::filesystem::path project = std::filesystem::path(KVFERRY_TEST_DATA_DIR).parent_path();
  std::set<std::string> used;
  for (const auto* const folder : {"include/kvferry", "src"}) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(project / folder)) {
      const bool is_source = entry.path().extension() == ".cpp" || entry.path().extension() == ".hpp";
      if (is_source && entry.path().parent_path().filename() != "testing") {
        add_events_in(content_of(entry.path()), used);
      }
    }
  }
  std::set<std::string> listed;
  const std::string guide = content_of(project / "docs/guide.md");
  const std::regex row("\n\\| `([a-z_]+)` \\| (debug|info|warning|error) \\|");
  for (std::sregex_iterator it(guide.begin(), guide.end(), row); it != std::sregex_iterator(); ++it) {
    listed.insert((*it)[1]);
  }
  EXPECT_GT(used.size(), 10U);
  EXPECT_EQ(used, listed);
}

TEST_F(ProcessSink, MayBeReplacedWhileItIsUsed) {
  Records records;
  kit::Logger logger;
  std::thread other([&] {
    for (int i = 0; i < 1000; ++i) {
      logger.log(LogLevel::error, "event", {}, std::error_code(i, std::generic_category()), [] { return "text"; });
    }
  });
  for (int i = 0; i < 1000; ++i) {
    set_log_sink(records.sink());
  }
  other.join();
}

}  // namespace
}  // namespace kvferry
