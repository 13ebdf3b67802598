// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_FENCE_HPP
#define KVFERRY_KIT_FENCE_HPP

#include <atomic>
#include <exception>
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

/// A call without a result on its way: ends once, perhaps by cancellation. A cancellation ends only the call, not the
/// work for which it waits.
class PlainCall : public Expirable, public std::enable_shared_from_this<PlainCall> {
 public:
  PlainCall(CompletionHandler<void(std::error_code)> completion, std::shared_ptr<DeadlineQueue> deadlines)
      : deadlines_(std::move(deadlines)), completion_(std::move(completion)) {}

  /// While nobody else can end it.
  void accept_cancellation() {
    if (completion_.cancellable()) {
      completion_.on_cancel(
          cancellation(deadlines_->gate(), weak_from_this(), [](PlainCall& call) { call.end(errc::cancelled); }));
    }
  }

  void end(std::error_code cause) {
    if (!ended_.exchange(true)) {
      before_end();
      auto completion = std::move(completion_);
      completion(cause);
    }
  }

  [[nodiscard]] bool ended() const noexcept { return ended_; }

  void expire() override {}

 protected:
  virtual void before_end() {}

  const std::shared_ptr<DeadlineQueue> deadlines_;

 private:
  CompletionHandler<void(std::error_code)> completion_;
  std::atomic<bool> ended_{false};
};

/// One call of `fence` on its way. It ends once: when nothing can land any more, or by cancellation. At its deadline
/// the link for which it waits is broken, and then nothing can land any more.
class Fence final : public PlainCall {
 public:
  Fence(FenceCompletion completion, Clock::time_point deadline, std::shared_ptr<DeadlineQueue> deadlines)
      : PlainCall(std::move(completion), std::move(deadlines)), deadline_(deadline) {}

  /// Waits for `link`, and calls `break_link` if that takes too long or the link can't ask. Call it once.
  void wait_for(Link& link, std::function<void()> break_link) {
    break_link_ = std::move(break_link);
    bool asks = false;
    try {
      deadlines_->add(deadline_, shared_from_this());
      asks = link.fence([self = shared_from_this()] { self->end({}); });
    } catch (const std::exception&) {
      // Memory is used up. The link may have been asked, or not.
    }
    if (!asks) {
      break_link_();
      end({});
    }
    if (ended()) {
      deadlines_->remove(deadline_, *this);  // perhaps before it was added
    }
  }

  void expire() override {
    if (!ended()) {
      break_link_();
    }
  }

 private:
  void before_end() override { deadlines_->remove(deadline_, *this); }

  const Clock::time_point deadline_;
  std::function<void()> break_link_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_FENCE_HPP
