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

/// A link's answer to a question, which comes once. A link that lets it go without an answer has failed within (memory was
/// used up): then the answer is lost, with which `lost` may deal while locks of the link are held.
class LinkAnswer {
 public:
  LinkAnswer(std::function<void()> comes, std::function<void()> lost)
      : comes_(std::move(comes)), lost_(std::move(lost)) {}
  LinkAnswer(const LinkAnswer&) = delete;
  LinkAnswer& operator=(const LinkAnswer&) = delete;
  ~LinkAnswer() {
    if (!come_.exchange(true)) {
      lost_();
    }
  }

  void comes() {
    if (!come_.exchange(true)) {
      comes_();
    }
  }
  void is_not_to_come() noexcept { come_ = true; }

 private:
  const std::function<void()> comes_;
  const std::function<void()> lost_;
  std::atomic<bool> come_{false};
};

/// One call of `fence` on its way. It ends once: when nothing can land any more, or by cancellation. At its deadline
/// the link for which it waits is broken, and then nothing can land any more. The same holds if the link loses the
/// question.
class Fence final : public PlainCall {
 public:
  Fence(FenceCompletion completion, Clock::time_point deadline, std::shared_ptr<DeadlineQueue> deadlines)
      : PlainCall(std::move(completion), std::move(deadlines)), deadline_(deadline) {}
  ~Fence() override {
    if (asked_) {
      end(errc::closed);  // the question was lost, and the channel closed before the link was broken because of that
    }
  }

  /// Whether a link has answered; known before the fence ends.
  [[nodiscard]] std::shared_ptr<const std::atomic<bool>> answered() const noexcept { return answered_; }

  /// Waits for `link`, and calls `break_link` if that takes too long or the link can't ask. Call it once.
  void wait_for(Link& link, std::function<void()> break_link) {
    break_link_ = std::move(break_link);
    bool asks = false;
    std::shared_ptr<LinkAnswer> answer;
    try {
      deadlines_->add(deadline_, shared_from_this());
      answer = std::make_shared<LinkAnswer>(
          [self = std::static_pointer_cast<Fence>(shared_from_this()), link_ended = link.ended()] {
            *self->answered_ = link_ended && !*link_ended;
            self->end({});
          },
          [self = std::static_pointer_cast<Fence>(shared_from_this())] {
            self->deadlines_->hasten(self->deadline_, *self);
          });
      asks = link.fence([answer] { answer->comes(); });
    } catch (const std::exception&) {
      // Memory is used up. The link may have been asked, or not.
    }
    asked_ = true;
    if (!asks) {
      if (answer) {
        answer->is_not_to_come();
      }
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
      end({});
    }
  }

 private:
  void before_end() override { deadlines_->remove(deadline_, *this); }

  const Clock::time_point deadline_;
  const std::shared_ptr<std::atomic<bool>> answered_ = std::make_shared<std::atomic<bool>>(false);
  std::function<void()> break_link_;
  bool asked_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_FENCE_HPP
