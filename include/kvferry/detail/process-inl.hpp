// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/process.hpp>

#include <pthread.h>

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE std::atomic<unsigned> generation{0};

/// Initialised once in the process, however many files define it; a constructor function would run once for each of them.
KVFERRY_INLINE const bool forks_are_counted =
    pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); }) == 0;

struct Inherited {
  std::mutex mutex;
  std::vector<std::shared_ptr<void>> objects;
};

/// Ends with the process: nobody waits for it.
struct HandlerThread {
  HandlerThread() = default;
  HandlerThread(const HandlerThread&) = delete;
  HandlerThread& operator=(const HandlerThread&) = delete;
  ~HandlerThread() {
    context.stop();
    thread.join();
  }

  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  std::thread thread = start_thread("kvferry-child", [this] { context.run(); });
};

KVFERRY_INLINE constinit PerProcess<Inherited> inherited;
KVFERRY_INLINE constinit PerProcess<HandlerThread> handler_thread;

}  // namespace internal

KVFERRY_INLINE unsigned process_generation() noexcept { return generation.load(std::memory_order_relaxed); }

KVFERRY_INLINE void keep_inherited(std::shared_ptr<void> object) {
  auto& [mutex, objects] = inherited.here();
  const std::lock_guard lock(mutex);
  objects.push_back(std::move(object));
}

KVFERRY_INLINE asio::any_io_executor executor_of_forked_child() { return handler_thread.here().context.get_executor(); }

}  // namespace kvferry
