// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/io_threads.hpp>

#include <asio/post.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <string>

#include <kvferry/completion.hpp>

#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// A handler that throws has ended like another.
template <class Run>
std::size_t run_guarded(Run run) noexcept {
  try {
    return run();
  } catch (...) {
    kvferry::detail::log_exception("on a thread of the channel's");
    return 1;
  }
}

}  // namespace internal

KVFERRY_INLINE IoThreads::IoThreads(std::size_t count, PollPolicy poll)
    : poller_(std::make_shared<Poller>(poll)),
      context_(static_cast<int>(std::max<std::size_t>(count, 1))),
      work_(context_.get_executor()) {
  threads_.reserve(std::max<std::size_t>(count, 1));
  try {
    for (std::size_t i = 0; i < std::max<std::size_t>(count, 1); ++i) {
      // Made here, where it can be told that there is no memory.
      threads_.push_back(start_thread("kvferry-io/" + std::to_string(i),
                                      [this, passed = std::make_shared<std::atomic<bool>>()] { run(passed); }));
    }
  } catch (...) {
    finish();
    throw;
  }
}

KVFERRY_INLINE IoThreads::~IoThreads() { finish(); }

KVFERRY_INLINE void IoThreads::finish() {
  work_.reset();
  for (auto& thread : threads_) {
    thread.join();
  }
  threads_.clear();
}

KVFERRY_INLINE void IoThreads::run(const std::shared_ptr<std::atomic<bool>>& passed) {
  poller_->enter();
  // Only handlers that are ready now, not those that they post: connections that aren't looked at post their next turn, and
  // might go on for ever while those that are looked at wait.
  const auto run_ready = [this, passed] {
    passed->store(false);
    asio::post(context_, [passed] { passed->store(true); });
    while (!passed->load() && run_guarded([this] { return context_.poll_one(); }) != 0) {
      end_forked_child();
    }
  };
  while (run_guarded([this] { return context_.run_one(); }) != 0) {
    end_forked_child();
    (void)run_guarded([&] {
      poller_->look(run_ready);
      return std::size_t{1};
    });
  }
}

KVFERRY_INLINE void IoThreads::end_forked_child() const {
  if (origin_.was_forked()) {
    std::exit(EXIT_SUCCESS);  // NOLINT(concurrency-mt-unsafe): a forked child has this thread alone
  }
}

}  // namespace kvferry::kit
