// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_FENCE_HPP
#define KVFERRY_KIT_FENCE_HPP

#include <atomic>
#include <functional>
#include <memory>
#include <system_error>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>

#include <kvferry/kit/gate.hpp>
#include <kvferry/kit/operation_registry.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// One call of `fence` on its way. It ends once: when nothing can land any more, or by cancellation; a deadline breaks
/// the link that it waits for, which then says so.
class Fence final : public Expirable, public std::enable_shared_from_this<Fence> {
 public:
  Fence(FenceCompletion completion, Clock::time_point deadline, std::shared_ptr<DeadlineQueue> deadlines)
      : completion_(std::move(completion)), deadline_(deadline), deadlines_(std::move(deadlines)) {}

  /// While nobody else can end it.
  void accept_cancellation() {
    if (completion_.cancellable()) {
      completion_.on_cancel(
          cancellation(deadlines_->gate(), weak_from_this(), [](Fence& fence) { fence.end(errc::cancelled); }));
    }
  }

  /// Waits for `link`, and calls `break_link` if that takes too long or the link can't say. To be called once.
  void wait_for(Link& link, std::function<void()> break_link) {
    break_link_ = std::move(break_link);
    deadlines_->add(deadline_, shared_from_this());
    if (!link.fence([self = shared_from_this()] { self->end({}); })) {
      break_link_();
      end({});
    }
    if (ended_) {
      deadlines_->remove(deadline_, *this);  // perhaps before it was added
    }
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
  std::function<void()> break_link_;
  std::atomic<bool> ended_{false};
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_FENCE_HPP
