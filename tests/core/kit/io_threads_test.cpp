// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/io_threads.hpp>

#include <asio/post.hpp>
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <stdexcept>

#include "common/allocation_limit.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// Always finds something, until it has been looked at often enough.
class Busy final : public Pollable {
 public:
  static constexpr int enough = 1000;

  Found poll() override { return ++polls < enough ? Found::something : Found::released; }
  void rest() override {}

  int polls = 0;
};

/// Handlers that post themselves again for as long as what is looked at has not been looked at often enough.
class Repeated {
 public:
  Repeated(IoThreads& threads, std::shared_ptr<Busy> busy) : threads_(threads), busy_(std::move(busy)) {}

  void run() {
    if (busy_->polls >= Busy::enough || ++runs_ == 10'000'000) {
      ended_.set_value(busy_->polls);
      return;
    }
    asio::post(threads_.executor(), [this] { run(); });
  }
  [[nodiscard]] int polls_in_the_end() { return ended_.get_future().get(); }

 private:
  IoThreads& threads_;
  const std::shared_ptr<Busy> busy_;
  int runs_ = 0;
  std::promise<int> ended_;
};

TEST(IoThreads, HandlersThatPostThemselvesAgainDoNotKeepThreadsFromLooking) {
  IoThreads threads(1, PollPolicy::always());
  const auto busy = std::make_shared<Busy>();
  Repeated repeated(threads, busy);
  asio::post(threads.executor(), [&] {
    EXPECT_TRUE(threads.poller()->watch(busy));
    repeated.run();
  });
  EXPECT_EQ(repeated.polls_in_the_end(), Busy::enough);
}

TEST(IoThreads, BeginWithoutMemory) {
  std::promise<void> ran;
  test::allocations_of_new_threads = 0;
  {
    IoThreads threads(2, PollPolicy::never());
    asio::post(threads.executor(), [&] { ran.set_value(); });
    ran.get_future().wait();
  }
  test::allocations_of_new_threads = test::unlimited_allocations;
}

TEST(IoThreads, GoOnAfterAHandlerThatThrows) {
  IoThreads threads(1, PollPolicy::always());
  const auto busy = std::make_shared<Busy>();
  std::promise<void> released;
  asio::post(threads.executor(), [&] {
    EXPECT_TRUE(threads.poller()->watch(busy));
    // Run between two looks.
    for (int i = 0; i < 3; ++i) {
      asio::post(threads.executor(), [] { throw std::runtime_error("from a handler of the test's"); });
    }
    asio::post(threads.executor(), [] { throw 17; });
    throw std::runtime_error("from a handler of the test's");
  });
  asio::post(threads.executor(), [&] { released.set_value(); });
  released.get_future().get();
  threads.finish();
  EXPECT_EQ(busy->polls, Busy::enough) << "what was looked at is looked at still";
}

TEST(IoThreads, WhatIsLookedAtDoesNotKeepThemFromHandlers) {
  IoThreads threads(1, PollPolicy::always());
  const auto busy = std::make_shared<Busy>();
  std::promise<int> polls;
  asio::post(threads.executor(), [&] {
    EXPECT_TRUE(threads.poller()->watch(busy));
    asio::post(threads.executor(), [&] { polls.set_value(busy->polls); });
  });
  EXPECT_LT(polls.get_future().get(), Busy::enough);
}

}  // namespace
}  // namespace kvferry::kit
