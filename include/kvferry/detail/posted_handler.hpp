// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <array>
#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::detail {

/// A handler that is posted once its operation has ended, and memory for whatever executors of Asio's keep it in until it runs: it is
/// there before the operation begins, so that nothing has to be allocated at its end.
///
/// Thread safety: `allocate` and `begin` may be called from any thread.
class PostedHandler {
 public:
  PostedHandler() = default;
  PostedHandler(const PostedHandler&) = delete;
  PostedHandler& operator=(const PostedHandler&) = delete;
  virtual ~PostedHandler() = default;

  /// Runs the handler, which is not kept any longer. To be called once.
  /// @param self this, which goes before the handler is called.
  virtual void run(std::shared_ptr<PostedHandler> self) = 0;

  /// @return true for the first caller: an executor may have taken what it was given, and then thrown.
  [[nodiscard]] bool begin() noexcept { return !begun_.exchange(true, std::memory_order_acq_rel); }
  [[nodiscard]] bool begun() const noexcept { return begun_.load(std::memory_order_acquire); }

  /// A block of the reserve, or of the heap if that is used up. @throws std::bad_alloc
  [[nodiscard]] void* allocate(std::size_t size) {
    const std::size_t rounded =
        (size + alignof(std::max_align_t) - 1) / alignof(std::max_align_t) * alignof(std::max_align_t);
    if (rounded <= reserve_.size()) {
      const std::size_t at = used_.fetch_add(rounded, std::memory_order_relaxed);
      if (at <= reserve_.size() - rounded) {
        return reserve_.data() + at;
      }
    }
    return ::operator new(size);
  }
  /// Blocks of the reserve are used once.
  void deallocate(void* block) noexcept {
    if (!std::less_equal<>()(static_cast<void*>(reserve_.data()), block) ||
        !std::less<>()(block, static_cast<void*>(reserve_.data() + reserve_.size()))) {
      ::operator delete(block);
    }
  }

 private:
  std::atomic<bool> begun_{false};
  std::atomic<std::size_t> used_{0};
  /// A strand has two blocks: for the handler, and for itself.
  alignas(std::max_align_t) std::array<std::byte, 192> reserve_;
};

/// A handler until it runs, in memory of its own allocator. Whoever posts a handler may still hold the owner of this while the handler runs,
/// whose end may free the allocator's memory.
template <class Handler, class Allocator>
class KeptHandler {
 public:
  template <class Given>
  KeptHandler(const Allocator& allocator, Given&& handler) : allocator_(std::in_place, allocator) {
    place_ = Traits::allocate(*allocator_, 1);
    try {
      // Not by the allocator: std::pmr's would take a handler that names its allocator for one that is to be given it.
      std::construct_at(std::to_address(place_), std::forward<Given>(handler));
    } catch (...) {
      Traits::deallocate(*allocator_, place_, 1);
      throw;
    }
  }
  KeptHandler(const KeptHandler&) = delete;
  KeptHandler& operator=(const KeptHandler&) = delete;
  ~KeptHandler() {
    if (allocator_) {
      try {
        (void)take();  // it may own the memory that it is in
      } catch (...) {
        free();  // moving it takes memory, and there is none
      }
    }
  }

  [[nodiscard]] Handler& operator*() noexcept { return *place_; }
  [[nodiscard]] const Handler& operator*() const noexcept { return *place_; }
  /// To be called once; nothing is kept afterwards.
  [[nodiscard]] Handler take() {
    Handler handler(std::move(*place_));
    free();
    return handler;
  }

 private:
  using Own = typename std::allocator_traits<Allocator>::template rebind_alloc<Handler>;
  using Traits = std::allocator_traits<Own>;

  void free() noexcept {
    Own allocator(std::move(*allocator_));
    allocator_.reset();
    std::destroy_at(std::to_address(place_));
    Traits::deallocate(allocator, place_, 1);
  }

  std::optional<Own> allocator_;
  typename Traits::pointer place_{};
};

/// The heap's: it needs no memory of its own.
template <class Handler, class Any>
class KeptHandler<Handler, std::allocator<Any>> {
 public:
  template <class Given>
  KeptHandler(const std::allocator<Any>& /*allocator*/, Given&& handler)
      : handler_(std::in_place, std::forward<Given>(handler)) {}

  [[nodiscard]] Handler& operator*() noexcept { return *handler_; }
  [[nodiscard]] const Handler& operator*() const noexcept { return *handler_; }
  [[nodiscard]] Handler take() {
    Handler handler(std::move(*handler_));
    handler_.reset();
    return handler;
  }

 private:
  std::optional<Handler> handler_;
};

/// Whether an executor uses an allocator only while its block holds what it was given: it need not keep the block alive then.
template <class Executor>
inline constexpr bool forgets_allocator = std::is_same_v<Executor, asio::io_context::executor_type>;

/// Allocates what an executor keeps a handler in.
/// @tparam Owner `PostedHandler*`, or a `std::shared_ptr` of one for an executor that may keep a copy.
template <class T, class Owner>
class PostAllocator {
 public:
  using value_type = T;
  template <class U>
  struct rebind {
    using other = PostAllocator<U, Owner>;
  };

  explicit PostAllocator(Owner owner) noexcept : owner_(std::move(owner)) {}
  template <class U>
  PostAllocator(const PostAllocator<U, Owner>& other) noexcept : owner_(other.owner()) {}

  [[nodiscard]] T* allocate(std::size_t count) const {
    static_assert(alignof(T) <= alignof(std::max_align_t));
    // cppcheck-suppress sizeofVoid ; that of void is only rebound
    return static_cast<T*>(owner_->allocate(count * sizeof(T)));
  }
  void deallocate(T* block, std::size_t /*count*/) const noexcept { owner_->deallocate(block); }

  [[nodiscard]] const Owner& owner() const noexcept { return owner_; }
  template <class U>
  bool operator==(const PostAllocator<U, Owner>& other) const noexcept {
    return owner_ == other.owner();
  }

 private:
  Owner owner_;
};

/// The function that an executor gets. It may be given several for one handler, of which the first to run is the one that counts.
template <class Owner>
class PostedRun {
 public:
  using allocator_type = PostAllocator<void, Owner>;

  explicit PostedRun(std::shared_ptr<PostedHandler> handler) noexcept : handler_(std::move(handler)) {}

  [[nodiscard]] allocator_type get_allocator() const noexcept {
    if constexpr (std::is_pointer_v<Owner>) {
      return allocator_type(handler_.get());
    } else {
      return allocator_type(handler_);
    }
  }

  void operator()() {
    if (auto handler = std::move(handler_); handler->begin()) {
      auto& self = *handler;
      self.run(std::move(handler));
    }
  }

 private:
  std::shared_ptr<PostedHandler> handler_;
};

/// Posts a handler. @throws whatever the executor throws, `std::bad_alloc` only if it has done so many times.
template <class Executor>
void post_handler(const Executor& executor, const std::shared_ptr<PostedHandler>& handler) {
  using Owner = std::conditional_t<forgets_allocator<Executor>, PostedHandler*, std::shared_ptr<PostedHandler>>;
  for (int tries = 100;; --tries) {
    try {
      asio::post(executor, PostedRun<Owner>(handler));
      return;
    } catch (const std::bad_alloc&) {
      if (tries == 0 || handler->begun()) {
        throw;
      }
    }
    std::this_thread::yield();
  }
}

/// The same where the executor's type is hidden, and with it that it takes an allocator. It is looked for.
void post_handler(const asio::any_io_executor& executor, const std::shared_ptr<PostedHandler>& handler);

}  // namespace kvferry::detail
