// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Calls `function` with each number below `count`, on up to `threads` threads, of which the calling one is one, and returns
/// when all calls have ended. With one thread they are in order.
/// @throws what one of the calls has thrown; after that no other one begins.
template <class Function>
void in_parallel(std::size_t threads, std::size_t count, const Function& function) {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&]() noexcept {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        function(i);
      } catch (...) {
        next = count;
        const std::lock_guard lock(mutex);
        if (failure == nullptr) {
          failure = std::current_exception();
        }
      }
    }
  };
  {
    struct Threads {
      ~Threads() {
        for (std::thread& thread : all) {
          thread.join();
        }
      }
      std::vector<std::thread> all;
    } others;
    const std::size_t wanted = std::min(threads, count);
    try {
      others.all.reserve(wanted);  // a thread that runs already, and has no place here, would end the process
      while (others.all.size() + 1 < wanted) {
        others.all.push_back(start_thread("kvferry-reg", work));
      }
    } catch (const std::exception&) {
      // No memory, or no thread, is left: those that there are do it.
    }
    work();
  }
  if (failure != nullptr) {
    std::rethrow_exception(failure);
  }
}

}  // namespace kvferry::rdma
