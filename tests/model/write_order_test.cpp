// SPDX-License-Identifier: Apache-2.0
//
// Random writes, reads, cancellations, deadlines, closes and restarts, over any number of lanes or rails, to a target
// that is held up now and then: what has ended stays ended. KVFERRY_MODEL_SECONDS says how long each test goes on,
// KVFERRY_MODEL_SEED how it begins.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/steady_timer.hpp>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <iostream>

#include <kvferry/testing/own_loopback.hpp>

#include "write_order_model.hpp"

namespace kvferry::inline KVFERRY_ABI::model {
namespace {

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

/// A target in a process of its own, which is told what to do line by line, and killed to be restarted.
class TargetProcess final : public Target {
 public:
  TargetProcess(const TargetShape& shape, int descriptor) : shape_(shape), descriptor_(descriptor) { spawn(url_); }
  TargetProcess(const TargetProcess&) = delete;
  TargetProcess& operator=(const TargetProcess&) = delete;
  ~TargetProcess() override { end(); }

  [[nodiscard]] std::string url() override { return url_; }
  void pause() override { ask("pause"); }
  void resume() override { ask("resume"); }
  void fence(const std::string& peer) override { ask("fence " + peer); }
  void restart() override {
    end();
    spawn(url_);
  }

 private:
  void spawn(const std::string& url) {
    std::array<int, 2> to{};
    std::array<int, 2> from{};
    if (::pipe2(to.data(), O_CLOEXEC) != 0 || ::pipe2(from.data(), O_CLOEXEC) != 0) {
      throw std::system_error(errno, std::generic_category(), "pipe2");
    }
    const std::vector<std::string> arguments{"/proc/self/exe",
                                             "--target",
                                             std::to_string(descriptor_),
                                             std::to_string(shape_.lanes),
                                             std::to_string(shape_.page_bytes),
                                             std::to_string(shape_.pages),
                                             url};
    std::vector<char*> pointers;
    for (const std::string& argument : arguments) {
      pointers.push_back(const_cast<char*>(argument.c_str()));
    }
    pointers.push_back(nullptr);
    child_ = ::fork();
    if (child_ == 0) {
      ::dup2(to[0], STDIN_FILENO);
      ::dup2(from[1], STDOUT_FILENO);
      ::execv(pointers[0], pointers.data());
      ::_exit(127);
    }
    ::close(to[0]);
    ::close(from[1]);
    commands_ = ::fdopen(to[1], "w");
    answers_ = ::fdopen(from[0], "r");
    url_ = answer();
  }

  void end() {
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    std::fclose(commands_);
    std::fclose(answers_);
  }

  void ask(const std::string& command) {
    std::fprintf(commands_, "%s\n", command.c_str());
    std::fflush(commands_);
    (void)answer();
  }

  std::string answer() {
    std::array<char, 200> line{};
    if (std::fgets(line.data(), line.size(), answers_) == nullptr) {
      throw std::runtime_error("the target's process has gone");
    }
    std::string text(line.data());
    text.pop_back();
    return text;
  }

  const TargetShape shape_;
  const int descriptor_;
  std::string url_ = kvferry::testing::own_loopback_url();
  pid_t child_ = 0;
  std::FILE* commands_ = nullptr;
  std::FILE* answers_ = nullptr;
};

/// The process of a `TargetProcess`.
int serve_target(char** arguments) {
  const TargetShape shape{std::stoul(arguments[3]), std::stoul(arguments[4]), std::stoul(arguments[5])};
  const SharedPages pages(std::stoi(arguments[2]), shape.pages * shape.page_bytes);
  TargetChannel target(shape, pages, arguments[6]);
  std::cout << target.url() << std::endl;
  std::string command;
  while (std::getline(std::cin, command)) {
    if (command == "pause") {
      target.pause();
    } else if (command == "resume") {
      target.resume();
    } else {
      target.fence(command.substr(std::strlen("fence ")));
    }
    std::cout << "done" << std::endl;
  }
  return 0;
}

/// Targets and writers of random shapes, one after the other, until the time is over.
class WriteOrder : public ::testing::Test {
 protected:
  void run(bool two_processes) {
    const auto until =
        std::chrono::steady_clock::now() + std::chrono::seconds(number_from("KVFERRY_MODEL_SECONDS", 20));
    std::uint64_t seed = number_from("KVFERRY_MODEL_SEED", 1);
    while (std::chrono::steady_clock::now() < until && !verdict_.failed()) {
      SCOPED_TRACE(::testing::Message() << "seed " << seed);
      run_shape(seed, two_processes, until);
      ASSERT_FALSE(verdict_.failed()) << "seed " << seed << ": " << verdict_.first();
      ++seed;
    }
    std::cout << counts_.page_checks << " page checks: " << counts_.succeeded << " writes succeeded, " << counts_.given_up
              << " were given up, of which " << counts_.in_flight << " in flight, " << counts_.reads << " reads, "
              << counts_.fences << " fences" << std::endl;
    EXPECT_GT(counts_.page_checks, 0U);
  }

 private:
  void run_shape(std::uint64_t seed, bool two_processes, std::chrono::steady_clock::time_point until) {
    std::mt19937_64 random(seed);
    constexpr std::array<std::size_t, 3> page_sizes{4096, 65536, 524288};
    constexpr std::size_t writers = 3;
    TargetShape shape;
    shape.lanes = 1 + random() % most_lanes();
    shape.page_bytes = page_sizes[random() % page_sizes.size()];
    const std::size_t pages_each = std::clamp<std::size_t>((std::size_t{4} << 20) / shape.page_bytes, 4, 64);
    shape.pages = writers * pages_each;
    const int descriptor = ::memfd_create("pages", 0);  // inherited by the target's process
    ASSERT_GE(descriptor, 0);
    ASSERT_EQ(::ftruncate(descriptor, static_cast<off_t>(shape.pages * shape.page_bytes)), 0);
    {
      const SharedPages pages(descriptor, shape.pages * shape.page_bytes);
      std::unique_ptr<Target> target;
      if (two_processes) {
        target = std::make_unique<TargetProcess>(shape, descriptor);
      } else {
        target = std::make_unique<TargetChannel>(shape, pages);
      }
      disturb(shape, pages, *target, random, writers, pages_each,
              std::min(until, std::chrono::steady_clock::now() + std::chrono::seconds(4)));
    }
    ::close(descriptor);
  }

  void disturb(const TargetShape& shape, const SharedPages& pages, Target& target, std::mt19937_64& random,
               std::size_t writers, std::size_t pages_each, std::chrono::steady_clock::time_point until) {
    std::mutex target_mutex;
    Source source(shape, target);
    const auto goes_on = [until] { return std::chrono::steady_clock::now() < until; };
    std::vector<std::jthread> threads;  // joined if the target can't be restarted, too: that throws, and says why
    for (std::size_t i = 0; i < writers; ++i) {
      threads.emplace_back([&, i, seed = random()] {
        Writer(shape, pages, target, target_mutex, source, verdict_, counts_, i * pages_each, pages_each, seed)
            .run(goes_on);
      });
    }
    // A pause of this thread's is a time in which the others work; nothing is concluded from it.
    asio::io_context clock;
    const auto rest = [&](std::uint64_t milliseconds) {
      asio::steady_timer timer(clock, std::chrono::milliseconds(milliseconds));
      timer.async_wait([](std::error_code) {});
      clock.run();
      clock.restart();
    };
    while (goes_on() && !verdict_.failed()) {
      rest(random() % 60);
      const std::uint64_t what = random() % 20;
      if (what == 0) {
        const std::lock_guard lock(target_mutex);
        target.restart();
      } else if (what < 4) {
        source.replace();
      } else {
        const std::lock_guard lock(target_mutex);
        target.pause();
        rest(random() % 60);
        target.resume();
      }
    }
  }

  Verdict verdict_;
  Counts counts_;
};

TEST_F(WriteOrder, InThreads) { run(false); }
TEST_F(WriteOrder, InTwoProcesses) { run(true); }

}  // namespace
}  // namespace kvferry::model

int main(int argc, char** argv) {
  if (argc == 7 && std::string(argv[1]) == "--target") {
    return kvferry::model::serve_target(argv);
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
