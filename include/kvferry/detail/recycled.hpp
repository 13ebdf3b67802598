// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_DETAIL_RECYCLED_HPP
#define KVFERRY_DETAIL_RECYCLED_HPP

#include <array>
#include <atomic>
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

/// Memory of one kind that was let go, for whoever asks next. It belongs to all threads, because one of a thread's own would have
/// to be registered at its end, for which the C library allocates, and ends the process if it can't.
///
/// @tparam list which of several lists of this kind.
template <class Kept, int list = 0>
class Spares {
 public:
  /// @return null if there is none.
  [[nodiscard]] static Kept* take() noexcept {
    for (auto& place : places_) {
      if (place.load(std::memory_order_relaxed) != nullptr) {
        if (Kept* const kept = place.exchange(nullptr, std::memory_order_acquire)) {
          return kept;
        }
      }
    }
    return nullptr;
  }
  /// @return whether there was room for it.
  [[nodiscard]] static bool keep(Kept* kept) noexcept {
    (void)&last_;
    for (auto& place : places_) {
      Kept* none = place.load(std::memory_order_relaxed);
      if (none == nullptr &&
          place.compare_exchange_strong(none, kept, std::memory_order_release, std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }

 private:
  /// Frees what is kept when the program ends or the library is unloaded. The places are never
  /// destroyed, so a later caller still finds them.
  struct Last {
    ~Last() {
      for (Kept* kept = take(); kept != nullptr; kept = take()) {
        kept->free();
      }
    }
  };

  inline static std::array<std::atomic<Kept*>, 4> places_{};
  inline static Last last_;
};

/// A block of memory for an object that is no more.
template <class Object>
struct SpareBlock {
  void free() noexcept { ::operator delete(this); }
};

/// A vector's memory.
template <class Item>
struct SpareItems {
  void free() noexcept { std::default_delete<SpareItems>()(this); }

  std::vector<Item> items;
};

/// Allocates what comes and goes with each operation: from what has been let go. Many blocking calls in a row allocate nothing.
template <class Object>
class Recycling {
 public:
  using value_type = Object;

  Recycling() noexcept = default;
  template <class Other>
  Recycling(const Recycling<Other>& /*other*/) noexcept {}

  [[nodiscard]] Object* allocate(std::size_t count) {
    static_assert(alignof(Object) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);
    void* memory = nullptr;
    if constexpr (recycles) {
      memory = count == 1 ? Spares<SpareBlock<Object>>::take() : nullptr;
    }
    return static_cast<Object*>(memory != nullptr ? memory : ::operator new(count * sizeof(Object)));
  }
  void deallocate(Object* object, std::size_t count) noexcept {
    if constexpr (recycles) {
      if (count == 1 &&
          Spares<SpareBlock<Object>>::keep(static_cast<SpareBlock<Object>*>(static_cast<void*>(object)))) {
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

template <class Item>
using FullSpares = Spares<SpareItems<Item>, 0>;
/// Spares whose memory is in use. They are kept, so that nothing is allocated when the memory comes back.
template <class Item>
using EmptySpares = Spares<SpareItems<Item>, 1>;

template <class Item, class List>
void keep_or_free(std::unique_ptr<SpareItems<Item>> spare, List /*list*/) noexcept {
  if (List::keep(spare.get())) {
    (void)spare.release();
  }
}

/// An empty vector, with the memory of one that has been let go.
template <class Item>
[[nodiscard]] std::vector<Item> take_spare_vector() noexcept {
  std::vector<Item> items;
  if constexpr (recycles) {
    if (std::unique_ptr<SpareItems<Item>> spare{FullSpares<Item>::take()}) {
      items = std::move(spare->items);
      keep_or_free(std::move(spare), EmptySpares<Item>());
    }
  }
  return items;
}

/// Keeps a vector's memory, unless there is much of it.
template <class Item>
void let_go(std::vector<Item>&& items) noexcept {
  constexpr std::size_t most_kept = 256;
  if constexpr (recycles) {
    if (items.capacity() == 0 || items.capacity() > most_kept) {
      return;
    }
    std::unique_ptr<SpareItems<Item>> spare{EmptySpares<Item>::take()};
    if (!spare) {
      spare.reset(new (std::nothrow) SpareItems<Item>);
    }
    if (spare) {
      items.clear();
      spare->items = std::move(items);
      keep_or_free(std::move(spare), FullSpares<Item>());
    }
  }
}

}  // namespace kvferry::detail

#endif  // KVFERRY_DETAIL_RECYCLED_HPP
