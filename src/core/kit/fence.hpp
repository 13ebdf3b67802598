// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <system_error>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/operation.hpp>

#include "gate.hpp"
#include "operation_registry.hpp"

namespace kvferry::kit {

/// One call of `fence` that waits for its peer. It ends once: when the link says so, or by cancellation; a deadline breaks
/// the link, which then says so.
class Fence final : public Expirable, public std::enable_shared_from_this<Fence> {
 public:
  Fence(FenceCompletion completion, Clock::time_point deadline, std::shared_ptr<DeadlineQueue> deadlines,
        std::function<void()> break_link)
      : completion_(std::move(completion)),
        deadline_(deadline),
        deadlines_(std::move(deadlines)),
        break_link_(std::move(break_link)) {}

  /// While nobody else can end it.
  void begin() {
    if (completion_.cancellable()) {
      completion_.on_cancel(
          cancellation(deadlines_->gate(), weak_from_this(), [](Fence& fence) { fence.end(errc::cancelled); }));
    }
    deadlines_->add(deadline_, shared_from_this());
  }

  void end(std::error_code cause) {
    if (!ended_.exchange(true)) {
      deadlines_->remove(deadline_, *this);
      auto completion = std::move(completion_);
      completion(cause);
    }
  }

  void expire() override {
    if (!ended_) {
      break_link_();
    }
  }

 private:
  FenceCompletion completion_;
  const Clock::time_point deadline_;
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const std::function<void()> break_link_;
  std::atomic<bool> ended_{false};
};

}  // namespace kvferry::kit
