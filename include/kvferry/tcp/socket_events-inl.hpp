// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/socket_events.hpp>

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <exception>
#include <new>
#include <span>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

inline constexpr std::size_t events_at_a_time = 64;

KVFERRY_INLINE int make_epoll() {
  const int descriptor = ::epoll_create1(EPOLL_CLOEXEC);
  if (descriptor < 0) {
    throw TransferError({errno, std::system_category()}, "data connections: no epoll");
  }
  return descriptor;
}

KVFERRY_INLINE void control(int epoll, int operation, int descriptor, std::uint32_t events, std::error_code& ec) {
  epoll_event event{};
  event.events = events;
  event.data.fd = descriptor;
  ec = ::epoll_ctl(epoll, operation, descriptor, &event) == 0 ? std::error_code()
                                                              : std::error_code(errno, std::system_category());
}

/// Asio takes the memory of a handler from where this leads.
template <class T, class Memory>
struct WaitAllocator {
  using value_type = T;

  explicit WaitAllocator(std::shared_ptr<Memory> source) noexcept : memory(std::move(source)) {}
  template <class Other>
  WaitAllocator(const WaitAllocator<Other, Memory>& other) noexcept  // NOLINT(google-explicit-constructor)
      : memory(other.memory) {}

  [[nodiscard]] T* allocate(std::size_t count) { return static_cast<T*>(memory->take(count * sizeof(T))); }
  void deallocate(T* block, std::size_t) noexcept { memory->give_back(block); }
  template <class Other>
  bool operator==(const WaitAllocator<Other, Memory>& other) const noexcept {
    return memory == other.memory;
  }

  std::shared_ptr<Memory> memory;
};

template <class Memory, class Function>
struct WaitHandler {
  using allocator_type = WaitAllocator<std::byte, Memory>;

  [[nodiscard]] allocator_type get_allocator() const noexcept { return allocator_type(memory); }
  void operator()(std::error_code ec) { function(ec); }

  std::shared_ptr<Memory> memory;
  Function function;
};

}  // namespace internal

/// For the one wait that there is at a time. If it could not be begun anew, nothing would be heard of any connection.
class SocketEvents::WaitMemory {
 public:
  [[nodiscard]] void* take(std::size_t size) {
    return size <= block_.size() && !taken_.exchange(true) ? block_.data() : ::operator new(size);
  }
  void give_back(void* block) noexcept {
    if (block == block_.data()) {
      taken_ = false;
    } else {
      ::operator delete(block);
    }
  }

 private:
  alignas(std::max_align_t) std::array<std::byte, 512> block_;
  std::atomic<bool> taken_{false};
};

KVFERRY_INLINE SocketEvents::SocketEvents(const asio::any_io_executor& executor)
    : wait_memory_(std::make_shared<WaitMemory>()),
      epoll_(executor, make_epoll()),
      descriptor_(epoll_.native_handle()) {}

KVFERRY_INLINE void SocketEvents::add(int descriptor, const std::shared_ptr<Listener>& listener, std::error_code& ec) {
  const std::lock_guard lock(mutex_);
  if (closed_) {
    ec = std::make_error_code(std::errc::operation_canceled);
    return;
  }
  if (!waiting_) {
    wait();
    waiting_ = true;
  }
  listeners_[descriptor] = listener;
  control(descriptor_, EPOLL_CTL_ADD, descriptor, EPOLLONESHOT, ec);
  if (ec) {
    listeners_.erase(descriptor);
  }
}

KVFERRY_INLINE void SocketEvents::arm(int descriptor, std::uint32_t events, std::error_code& ec) const {
  control(descriptor_, EPOLL_CTL_MOD, descriptor, events | EPOLLONESHOT, ec);
}

KVFERRY_INLINE void SocketEvents::remove(int descriptor) {
  const std::lock_guard lock(mutex_);
  listeners_.erase(descriptor);
  std::error_code ignored;
  control(descriptor_, EPOLL_CTL_DEL, descriptor, 0, ignored);
}

KVFERRY_INLINE void SocketEvents::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  listeners_.clear();
  std::error_code ignored;
  epoll_.cancel(ignored);
}

KVFERRY_INLINE void SocketEvents::wait() {
  auto report = [weak = weak_from_this()](std::error_code ec) {
    const auto self = weak.lock();
    if (self && !ec) {
      self->report();
    }
  };
  epoll_.async_wait(asio::posix::stream_descriptor::wait_read,
                    WaitHandler<WaitMemory, decltype(report)>{wait_memory_, std::move(report)});
}

KVFERRY_INLINE void SocketEvents::report() {
  std::array<epoll_event, events_at_a_time> events;
  struct Ready {
    std::shared_ptr<Listener> listener;
    std::uint32_t events = 0;
  };
  // Their events are told once: there may be no memory to keep them in.
  std::array<Ready, events_at_a_time> ready;
  std::size_t ready_count = 0;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) {
      return;
    }
    const int count = ::epoll_wait(descriptor_, events.data(), static_cast<int>(events.size()), 0);
    for (const epoll_event event : std::span(events).first(static_cast<std::size_t>(std::max(count, 0)))) {
      const auto it = listeners_.find(event.data.fd);
      if (it != listeners_.end()) {
        if (auto listener = it->second.lock()) {
          ready[ready_count++] = {std::move(listener), event.events};
        }
      }
    }
    // Another thread of the executor may take what comes next.
    try {
      wait();
    } catch (const std::exception&) {
      waiting_ = false;  // the executor has no memory; what has come is told all the same, for it isn't told again
      detail::log_exception("when connections were waited for");
    }
  }
  for (const auto& [listener, what] : std::span(ready).first(ready_count)) {
    const bool broken = (what & (EPOLLERR | EPOLLHUP)) != 0;
    try {
      listener->socket_ready(broken || (what & EPOLLIN) != 0, broken || (what & EPOLLOUT) != 0, broken);
    } catch (const std::bad_alloc&) {
      detail::log_exception("at an event of a connection");  // the others have theirs, too
    }
  }
}

}  // namespace kvferry::tcp
