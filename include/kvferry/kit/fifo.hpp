// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_FIFO_HPP
#define KVFERRY_KIT_FIFO_HPP

#include <cstddef>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A queue that allocates nothing while it has few items: a std::deque allocates when it is made, and again and again
/// while items pass through it.
template <class Item>
class Fifo {
 public:
  /// The memory for so many items is kept when the queue is empty.
  static constexpr std::size_t most_kept = 64;

  Fifo() = default;
  Fifo(const Fifo&) = delete;
  Fifo& operator=(const Fifo&) = delete;
  Fifo(Fifo&& other) noexcept : items_(std::move(other.items_)), head_(std::exchange(other.head_, 0)) {}
  Fifo& operator=(Fifo&& other) noexcept {
    items_ = std::move(other.items_);
    head_ = std::exchange(other.head_, 0);
    return *this;
  }
  ~Fifo() = default;

  [[nodiscard]] bool empty() const noexcept { return head_ == items_.size(); }
  [[nodiscard]] std::size_t size() const noexcept { return items_.size() - head_; }
  /// For how many items there is memory.
  [[nodiscard]] std::size_t capacity() const noexcept { return items_.capacity(); }
  [[nodiscard]] Item& front() noexcept { return items_[head_]; }
  [[nodiscard]] const Item& front() const noexcept { return items_[head_]; }
  [[nodiscard]] auto begin() noexcept { return items_.begin() + static_cast<std::ptrdiff_t>(head_); }
  [[nodiscard]] auto end() noexcept { return items_.end(); }
  [[nodiscard]] auto begin() const noexcept { return items_.begin() + static_cast<std::ptrdiff_t>(head_); }
  [[nodiscard]] auto end() const noexcept { return items_.end(); }

  void push_back(Item item) {
    if (items_.size() == items_.capacity() && head_ * 2 >= items_.size()) {
      drop_taken();
    }
    items_.push_back(std::move(item));
  }
  void pop_front() {
    items_[head_] = Item();
    if (++head_ == items_.size()) {
      clear();
    }
  }
  void pop_back() {
    items_.pop_back();
    if (empty()) {
      clear();
    }
  }
  auto erase(typename std::vector<Item>::iterator item) { return items_.erase(item); }
  template <class Predicate>
  void erase_if(Predicate predicate) {
    drop_taken();
    std::erase_if(items_, predicate);
  }
  /// Needs no memory.
  void clear() noexcept {
    items_.clear();
    head_ = 0;
    if (items_.capacity() > most_kept) {
      std::vector<Item>().swap(items_);
    }
  }

 private:
  /// Moves at most as many items as have been taken since the last time.
  void drop_taken() {
    items_.erase(items_.begin(), begin());
    head_ = 0;
  }

  std::vector<Item> items_;
  std::size_t head_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_FIFO_HPP
