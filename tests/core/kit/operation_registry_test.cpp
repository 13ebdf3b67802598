// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/kit/operation_registry.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

class Operations : public ::testing::Test {
 protected:
  std::shared_ptr<Operation> add(
      TransferKind kind, std::string peer_id, std::function<void()> when_ended = [] {}) {
    TransferRequest request;
    request.kind = kind;
    request.peer_id = std::move(peer_id);
    auto operation = std::make_shared<Operation>(
        std::move(request), Completion::direct([end = std::move(when_ended)](std::error_code, std::size_t) { end(); }),
        Clock::now() + std::chrono::hours(1), registry_);
    EXPECT_FALSE(registry_->add(operation));
    return operation;
  }

  asio::io_context context_;
  std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  std::shared_ptr<OperationRegistry> registry_ = std::make_shared<OperationRegistry>(deadlines_, 16);
};

TEST_F(Operations, WhatThrowsAtTheirEndLosesNothingButItself) {
  int done = 0;
  bool ended = false;
  const auto write = add(TransferKind::write, "peer", [&] { ended = true; });
  registry_->when_writes_ended("peer", [] { throw std::bad_alloc(); });
  registry_->when_writes_ended("peer", [&done] { ++done; });
  EXPECT_NO_THROW(write->finish({}));
  EXPECT_TRUE(ended);
  EXPECT_EQ(done, 1);
  const auto next = add(TransferKind::write, "peer");
  next->finish({});
  EXPECT_EQ(done, 1);
  registry_->wait_until_empty();
}

TEST_F(Operations, TheWritesToAPeerAreAwaitedThatHadBeenStarted) {
  int done = 0;
  const auto count = [&done] { ++done; };
  const auto first = add(TransferKind::write, "peer");
  const auto second = add(TransferKind::write, "peer");
  const auto read = add(TransferKind::read, "peer");
  const auto other = add(TransferKind::write, "other");
  registry_->when_writes_ended("peer", count);
  const auto later = add(TransferKind::write, "peer");
  registry_->when_writes_ended("peer", count);
  for (const auto& operation : {read, other, second}) {
    operation->finish({});
    EXPECT_EQ(done, 0);
  }
  first->finish(errc::connection_lost);
  EXPECT_EQ(done, 1) << "the first that waits, and not the one that waits for the later write as well";
  later->finish({});
  EXPECT_EQ(done, 2);
}

TEST_F(Operations, WhatIsStartedWhileOthersAreStoppedIsNotAwaited) {
  int done = 0;
  std::shared_ptr<Operation> again;
  const auto first = add(TransferKind::recv, "peer", [&] { again = add(TransferKind::recv, "peer"); });
  const std::uint64_t last = registry_->stop("peer", errc::cancelled);
  ASSERT_TRUE(first->finished() && again);
  registry_->when_operations_ended("peer", last, [&done] { ++done; });
  EXPECT_EQ(done, 1) << "a server posts the next recv in the handler of the one before";
  EXPECT_FALSE(again->finished());
  again->finish({});
  EXPECT_EQ(done, 1);
}

TEST_F(Operations, NobodyWaitsForNothing) {
  int done = 0;
  registry_->when_writes_ended("peer", [&done] { ++done; });
  EXPECT_EQ(done, 1);
}

}  // namespace
}  // namespace kvferry::kit
