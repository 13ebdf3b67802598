// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_WAIT_QUEUE_HPP
#define KVFERRY_KIT_WAIT_QUEUE_HPP

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

#include <kvferry/kit/operation_registry.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Items on their way to the channel's user, in boxes by key. An item waits for a call, or a call for an item. Calls
/// for a key are served in their order, each when all of its items are there. Thread-safe; lives in a shared_ptr.
template <class Item>
class WaitQueue : public std::enable_shared_from_this<WaitQueue<Item>> {
 public:
  using Items = std::vector<Item>;
  using ItemsCompletion = CompletionHandler<void(std::error_code, Items)>;

  explicit WaitQueue(std::shared_ptr<DeadlineQueue> deadlines) : deadlines_(std::move(deadlines)) {}
  WaitQueue(const WaitQueue&) = delete;
  WaitQueue& operator=(const WaitQueue&) = delete;
  virtual ~WaitQueue() = default;

  /// Hands out the next `wanted` items of a key. At the timeout the first call for a key gets the items that have come.
  void receive(std::uint64_t key, std::size_t wanted, std::optional<std::chrono::milliseconds> timeout,
               ItemsCompletion completion) {
    std::unique_lock lock(mutex_);
    if (closed_) {
      lock.unlock();
      completion(errc::closed, {});
      return;
    }
    Box& box = boxes_[key];
    if (wanted == 0 || (box.calls.empty() && box.items.size() >= wanted)) {
      Items items = take(box, wanted);
      tidy(key);
      lock.unlock();
      completion({}, std::move(items));
      return;
    }
    // All that needs memory comes before the call is there.
    const auto call = std::make_shared<Call>(this->weak_from_this(), key, wanted, std::move(completion));
    Calls entry{call};
    if (timeout) {
      call->deadline = deadline_after(*timeout);
    }
    if (call->completion.cancellable()) {
      call->completion.on_cancel(
          cancellation(deadlines_->gate(), std::weak_ptr(call), [](Call& pending) { pending.end(errc::cancelled); }));
    }
    if (call->deadline) {
      deadlines_->add(*call->deadline, call);
    }
    box.calls.splice(box.calls.end(), entry);
  }

  /// Items that wait.
  [[nodiscard]] std::size_t pending() const {
    const std::lock_guard lock(mutex_);
    return count_;
  }

  /// Ends all calls with `errc::closed`, later ones too.
  void close() {
    Calls served;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      for (auto& [key, box] : boxes_) {
        while (!box.calls.empty()) {
          serve(box, box.calls.begin(), errc::closed, {}, served);
        }
      }
    }
    finish(served);
  }

 protected:
  /// @return false if the queue is closed or `keep` has no room.
  [[nodiscard]] bool push_item(std::uint64_t key, Item item) {
    Calls served;
    {
      const std::lock_guard lock(mutex_);
      if (closed_) {
        return false;
      }
      Box& box = boxes_[key];
      if (box.calls.empty() || box.items.size() + 1 < box.calls.front()->wanted) {
        if (!keep(item)) {
          tidy(key);
          return false;
        }
        try {
          box.items.push_back(std::move(item));
        } catch (...) {
          let_go(item);
          throw;
        }
        ++count_;
        return true;
      }
      // An item that completes a call needs no room.
      Items items = take(box, box.items.size());
      items.push_back(std::move(item));
      serve(box, box.calls.begin(), {}, std::move(items), served);
      tidy(key);
    }
    finish(served);
    return true;
  }

  /// An item is about to be kept. With the lock held. @return false if there is no room for it.
  [[nodiscard]] virtual bool keep(Item& item) = 0;
  /// An item that was kept is handed out or dropped. With the lock held.
  virtual void let_go(const Item& item) = 0;

  /// How many items are kept. With the lock held.
  [[nodiscard]] std::size_t count() const noexcept { return count_; }
  /// Drops the oldest item of a key, which has one. With the lock held.
  void drop_oldest(std::uint64_t key) { (void)take(boxes_.at(key), 1); }
  /// Drops the items of keys other than 0 that no call waits for, as far as `drops` holds for them. @return how many.
  template <class Predicate>
  std::size_t drop_unasked_if(Predicate drops) {
    Items dropped;  // destroyed after the lock is released
    const std::lock_guard lock(mutex_);
    for (auto box = boxes_.upper_bound(0); box != boxes_.end();) {
      auto& items = box->second.items;
      if (box->second.calls.empty()) {
        const auto first =
            std::stable_partition(items.begin(), items.end(), [&](const Item& item) { return !drops(item); });
        dropped.reserve(dropped.size() + static_cast<std::size_t>(items.end() - first));
        for (auto it = first; it != items.end(); ++it) {
          let_go(*it);
          dropped.push_back(std::move(*it));
        }
        count_ -= static_cast<std::size_t>(items.end() - first);
        items.erase(first, items.end());
      }
      box = items.empty() && box->second.calls.empty() ? boxes_.erase(box) : std::next(box);
    }
    return dropped.size();
  }
  /// The oldest item of a key; null if there is none. With the lock held.
  [[nodiscard]] Item* oldest(std::uint64_t key) {
    const auto box = boxes_.find(key);
    return box == boxes_.end() || box->second.items.empty() ? nullptr : &box->second.items.front();
  }

 private:
  struct Call final : Expirable {
    Call(std::weak_ptr<WaitQueue> owner, std::uint64_t of_key, std::size_t number, ItemsCompletion handler)
        : queue(std::move(owner)), key(of_key), wanted(number), completion(std::move(handler)) {}

    void expire() override { end(errc::timed_out); }
    void end(std::error_code cause) {
      if (const auto owner = queue.lock()) {
        owner->end(*this, cause);
      }
    }

    const std::weak_ptr<WaitQueue> queue;
    const std::uint64_t key;
    const std::size_t wanted;
    ItemsCompletion completion;
    std::optional<Clock::time_point> deadline;
    bool ended = false;
    // With what, when it has
    std::error_code ec;
    Items items;
  };
  using Calls = std::list<std::shared_ptr<Call>>;

  struct Box {
    std::deque<Item> items;
    Calls calls;
  };

  /// If it throws, nothing has been taken.
  [[nodiscard]] Items take(Box& box, std::size_t number) {
    Items items;
    items.reserve(number + 1);
    for (; number != 0; --number) {
      let_go(box.items.front());
      items.push_back(std::move(box.items.front()));
      box.items.pop_front();
      --count_;
    }
    return items;
  }

  static void serve(Box& box, typename Calls::iterator call, std::error_code ec, Items items, Calls& served) noexcept {
    (*call)->ended = true;
    (*call)->ec = ec;
    (*call)->items = std::move(items);
    served.splice(served.end(), box.calls, call);
  }

  /// Forgets an empty box. Key 0's stays: it is in use all the time.
  void tidy(std::uint64_t key) {
    const auto box = key == 0 ? boxes_.end() : boxes_.find(key);
    if (box != boxes_.end() && box->second.items.empty() && box->second.calls.empty()) {
      boxes_.erase(box);
    }
  }

  void end(Call& ended, std::error_code cause) {
    Calls served;
    {
      const std::lock_guard lock(mutex_);
      if (ended.ended) {
        return;
      }
      Box& box = boxes_.at(ended.key);
      const auto it = std::ranges::find_if(box.calls, [&](const auto& call) { return call.get() == &ended; });
      const bool first = it == box.calls.begin();
      serve(box, it, cause, first && cause == errc::timed_out ? take(box, box.items.size()) : Items(), served);
      // The items that it leaves may be all that the next calls want.
      while (first && !box.calls.empty() && box.items.size() >= box.calls.front()->wanted) {
        Items items;
        std::error_code ec;
        try {
          items = take(box, box.calls.front()->wanted);
        } catch (const std::bad_alloc&) {
          ec = std::make_error_code(std::errc::not_enough_memory);  // or it would wait for what is there
        }
        serve(box, box.calls.begin(), ec, std::move(items), served);
      }
      tidy(ended.key);
    }
    finish(served);
  }

  /// Without the lock.
  void finish(Calls& served) {
    for (const auto& call : served) {
      if (call->deadline) {
        deadlines_->remove(*call->deadline, *call);
      }
      call->completion(call->ec, std::move(call->items));
    }
  }

  const std::shared_ptr<DeadlineQueue> deadlines_;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, Box> boxes_;  ///< Those with items or calls, and key 0's.
  std::size_t count_ = 0;
  bool closed_ = false;
};

/// Ends a call for one item with the first of those that came.
template <class Item>
[[nodiscard]] typename WaitQueue<Item>::ItemsCompletion for_one(
    CompletionHandler<void(std::error_code, Item)> completion) {
  return WaitQueue<Item>::ItemsCompletion::wrapping(std::move(completion),
                                                    [](auto& end, std::error_code ec, std::vector<Item> items) {
                                                      end(ec, items.empty() ? Item{} : std::move(items.front()));
                                                    });
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_WAIT_QUEUE_HPP
