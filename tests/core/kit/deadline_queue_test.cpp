// SPDX-License-Identifier: Apache-2.0
#include <kvferry/kit/operation_registry.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <future>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/completion.hpp>

#include "common/allocation_limit.hpp"
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using std::chrono::hours;
using std::chrono::milliseconds;

/// Notes that its deadline has passed.
class Noted final : public Expirable {
 public:
  Noted(std::string& log, char name) : log_(log), name_(name) {}
  void expire() override {
    log_ += name_;
    if (name_ == 'x') {
      throw std::runtime_error("the test says so");
    }
  }

 private:
  std::string& log_;
  const char name_;
};

class DeadlineQueueTest : public ::testing::Test {
 protected:
  /// Until so many have expired, or for ever.
  void run_until(std::size_t expired) {
    context_.restart();
    while (log_.size() < expired && context_.run_one() != 0) {
    }
  }
  std::shared_ptr<Expirable> add(char name, Clock::time_point deadline) {
    auto entry = std::make_shared<Noted>(log_, name);
    queue_->add(deadline, entry);
    return entry;
  }

  asio::io_context context_;
  const std::shared_ptr<DeadlineQueue> queue_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  const Clock::time_point now_ = Clock::now();
  std::string log_;
};

TEST_F(DeadlineQueueTest, AnEarlierDeadlineIsNotMissedBecauseOfALaterOne) {
  add('b', now_ + hours(1));
  add('a', now_ + milliseconds(1));
  run_until(1);
  EXPECT_EQ(log_, "a");
  EXPECT_EQ(queue_->size(), 1U);
}

TEST_F(DeadlineQueueTest, EachDeadlineIsArmedWhenTheOneBeforeHasPassed) {
  add('a', now_ + milliseconds(1));
  add('c', now_ + milliseconds(20));
  add('b', now_ + milliseconds(10));
  run_until(3);
  EXPECT_EQ(log_, "abc");
  EXPECT_EQ(queue_->size(), 0U);
  add('d', Clock::now());
  run_until(4);
  EXPECT_EQ(log_, "abcd");
}

TEST_F(DeadlineQueueTest, WhatIsRemovedDoesNotExpireAndKeepsNothingElseFromIt) {
  const auto deadline = now_ + milliseconds(1);
  const auto first = add('a', deadline);
  const auto second = add('b', deadline);
  add('c', now_ + milliseconds(10));
  queue_->remove(deadline, *first);
  run_until(2);
  EXPECT_EQ(log_, "bc");
  queue_->remove(deadline, *second);  // has expired: nothing to be done
}

TEST_F(DeadlineQueueTest, OneThatThrowsKeepsNoOtherFromExpiring) {
  add('x', now_);
  add('a', now_);
  run_until(2);
  EXPECT_EQ(log_, "xa");
}

TEST_F(DeadlineQueueTest, NoMemoryKeepsNoneFromExpiring) {
  add('a', now_);
  add('b', now_);
  add('c', now_ + milliseconds(1));
  test::allocations_left = 0;
  run_until(2);
  test::allocations_left = test::unlimited_allocations;
  EXPECT_EQ(log_.substr(0, 2), "ab");
  add('d', now_ + milliseconds(2));  // what could not be armed is armed with it
  run_until(4);
  EXPECT_EQ(log_, "abcd");
}

TEST_F(DeadlineQueueTest, WhatFindsNoMemoryAtItsDeadlineTriesAgain) {
  class Poor final : public Expirable {
   public:
    explicit Poor(std::string& log) : log_(log) {}
    void expire() override {
      if (tries_++ < 2) {
        throw std::bad_alloc();
      }
      log_ += 'p';
    }

   private:
    std::string& log_;
    int tries_ = 0;
  };
  queue_->add(now_, std::make_shared<Poor>(log_));
  add('a', now_ + milliseconds(1));
  run_until(2);
  EXPECT_EQ(log_, "ap");
  EXPECT_EQ(queue_->size(), 0U);
}

TEST_F(DeadlineQueueTest, WhatIsHastenedNeedsNoMemoryForIt) {
  const auto deadline = now_ + hours(1);
  const auto hastened = add('a', deadline);
  const auto other = add('b', deadline);
  test::allocations_left = 0;
  queue_->hasten(deadline, *hastened);
  test::allocations_left = test::unlimited_allocations;
  run_until(1);
  EXPECT_EQ(log_, "a");
  EXPECT_EQ(queue_->size(), 1U);
  queue_->hasten(deadline, *hastened);  // has expired: nothing to be done
  EXPECT_EQ(queue_->size(), 1U);
}

TEST_F(DeadlineQueueTest, WhatCannotBeAddedHasNotBeen) {
  add('a', now_ + milliseconds(1));
  const auto entry = std::make_shared<Noted>(log_, 'b');
  test::allocations_left = 0;
  EXPECT_THROW(queue_->add(now_, entry), std::bad_alloc);
  test::allocations_left = test::unlimited_allocations;
  EXPECT_EQ(queue_->size(), 1U);
  run_until(1);
  EXPECT_EQ(log_, "a");
}

TEST_F(DeadlineQueueTest, ClosedItHoldsNothingAndKeepsNoThreadWaiting) {
  std::weak_ptr<Expirable> before = add('a', now_ + hours(1));
  queue_->close();
  std::weak_ptr<Expirable> after = add('b', now_ + hours(1));
  EXPECT_TRUE(before.expired());
  EXPECT_TRUE(after.expired());
  EXPECT_EQ(queue_->size(), 0U);
  context_.run();
  EXPECT_EQ(log_, "");
}

class OperationRegistryTest : public DeadlineQueueTest {
 protected:
  std::shared_ptr<Operation> operation(Clock::time_point deadline = Clock::now() + hours(1)) {
    return std::make_shared<Operation>(TransferRequest{}, Completion::direct([this](std::error_code ec, std::size_t) {
                                         ended_.push_back(ec);
                                       }),
                                       deadline, registry_);
  }

  const std::shared_ptr<OperationRegistry> registry_ = std::make_shared<OperationRegistry>(queue_, 2);
  std::vector<std::error_code> ended_;
};

TEST_F(OperationRegistryTest, TakesAsManyAsItsLimitAndMoreWhenOneHasEnded) {
  const auto first = operation();
  const auto second = operation();
  const auto third = operation();
  EXPECT_FALSE(registry_->add(first));
  EXPECT_FALSE(registry_->add(second));
  EXPECT_EQ(registry_->add(third), errc::resource_limit);
  EXPECT_EQ(queue_->size(), 2U);
  first->finish({});
  EXPECT_EQ(queue_->size(), 1U) << "what has ended has no deadline";
  EXPECT_FALSE(registry_->add(third));
  second->finish({});
  third->finish({});
  registry_->wait_until_empty();
}

TEST_F(OperationRegistryTest, ClosedItStopsWhatThereIsAndTakesNothing) {
  const auto pending = operation();
  ASSERT_FALSE(registry_->add(pending));
  registry_->close(errc::closed);
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::closed)});
  EXPECT_EQ(registry_->add(operation()), errc::closed);
  registry_->wait_until_empty();
}

TEST_F(OperationRegistryTest, WhoWaitsUntilItIsEmptyIsWokenByTheLastEndAndNotBefore) {
  const auto first = operation();
  const auto second = operation();
  ASSERT_FALSE(registry_->add(first));
  ASSERT_FALSE(registry_->add(second));
  auto empty = std::async(std::launch::async, [this] { registry_->wait_until_empty(); });
  first->finish({});
  EXPECT_EQ(empty.wait_for(milliseconds(50)), std::future_status::timeout);
  second->finish({});
  empty.get();
}

TEST_F(OperationRegistryTest, AnOperationEndsAtItsDeadline) {
  const auto late = operation(now_);
  ASSERT_FALSE(registry_->add(late));
  while (ended_.empty() && context_.run_one() != 0) {
  }
  EXPECT_EQ(ended_, std::vector{make_error_code(errc::timed_out)});
}

}  // namespace
}  // namespace kvferry::kit
