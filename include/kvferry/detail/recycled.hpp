// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_DETAIL_RECYCLED_HPP
#define KVFERRY_DETAIL_RECYCLED_HPP

#include <array>
#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::detail {

// Sanitizers are to see each object's end.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool recycles = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool recycles = false;
#else
inline constexpr bool recycles = true;
#endif
#else
inline constexpr bool recycles = true;
#endif

/// What a thread keeps of one kind for the next who asks; gone with the thread.
template <class Kept>
class OfThread {
 public:
  /// Null once the thread ends.
  [[nodiscard]] static Kept* get() noexcept {
    if (ended_) {
      return nullptr;
    }
    static thread_local OfThread own;
    return &own.kept_;
  }

 private:
  OfThread() = default;
  OfThread(const OfThread&) = delete;
  OfThread& operator=(const OfThread&) = delete;
  ~OfThread() { ended_ = true; }

  inline static thread_local bool ended_ = false;
  Kept kept_;
};

/// A few blocks of memory.
class SpareBlocks {
 public:
  SpareBlocks() = default;
  SpareBlocks(const SpareBlocks&) = delete;
  SpareBlocks& operator=(const SpareBlocks&) = delete;
  ~SpareBlocks() {
    while (count_ != 0) {
      ::operator delete(blocks_[--count_].memory);
    }
  }

  /// @return null if there is none of this size.
  [[nodiscard]] void* take(std::size_t size) noexcept {
    for (std::size_t i = count_; i-- != 0;) {
      if (blocks_[i].size == size) {
        return std::exchange(blocks_[i], blocks_[--count_]).memory;
      }
    }
    return nullptr;
  }
  /// @return whether there was room for it.
  [[nodiscard]] bool keep(void* memory, std::size_t size) noexcept {
    if (count_ == blocks_.size()) {
      return false;
    }
    blocks_[count_++] = {memory, size};
    return true;
  }

 private:
  struct Block {
    void* memory = nullptr;
    std::size_t size = 0;
  };

  std::array<Block, 6> blocks_;
  std::size_t count_ = 0;
};

/// Allocates what comes and goes with each operation: from what the same thread has let go. A blocking call begins and ends its
/// operation on one thread, so that many in a row allocate nothing.
template <class Object>
class Recycling {
 public:
  using value_type = Object;

  Recycling() noexcept = default;
  template <class Other>
  Recycling(const Recycling<Other>& /*other*/) noexcept {}

  [[nodiscard]] Object* allocate(std::size_t count) {
    static_assert(alignof(Object) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);
    const std::size_t size = count * sizeof(Object);
    if constexpr (recycles) {
      SpareBlocks* const spares = OfThread<SpareBlocks>::get();
      if (void* const memory = spares != nullptr ? spares->take(size) : nullptr) {
        return static_cast<Object*>(memory);
      }
    }
    return static_cast<Object*>(::operator new(size));
  }
  void deallocate(Object* object, std::size_t count) noexcept {
    if constexpr (recycles) {
      SpareBlocks* const spares = OfThread<SpareBlocks>::get();
      if (spares != nullptr && spares->keep(object, count * sizeof(Object))) {
        return;
      }
    }
    ::operator delete(object);
  }
  template <class Other>
  [[nodiscard]] bool operator==(const Recycling<Other>& /*other*/) const noexcept {
    return true;
  }
};

template <class Object, class... Given>
[[nodiscard]] std::shared_ptr<Object> make_recycled(Given&&... given) {
  return std::allocate_shared<Object>(Recycling<Object>(), std::forward<Given>(given)...);
}

/// An empty vector, with the memory of one that the same thread has let go.
template <class Item>
[[nodiscard]] std::vector<Item> take_spare_vector() noexcept {
  if constexpr (recycles) {
    if (std::vector<Item>* const spare = OfThread<std::vector<Item>>::get()) {
      return std::exchange(*spare, {});
    }
  }
  return {};
}

/// Keeps a vector's memory, unless there is much of it.
template <class Item>
void let_go(std::vector<Item>&& items) noexcept {
  constexpr std::size_t most_kept = 256;
  if constexpr (recycles) {
    std::vector<Item>* const spare = OfThread<std::vector<Item>>::get();
    if (spare != nullptr && items.capacity() > spare->capacity() && items.capacity() <= most_kept) {
      items.clear();
      *spare = std::move(items);
    }
  }
}

}  // namespace kvferry::detail

#endif  // KVFERRY_DETAIL_RECYCLED_HPP
