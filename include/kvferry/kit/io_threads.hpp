// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_IO_THREADS_HPP
#define KVFERRY_KIT_IO_THREADS_HPP

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/kit/poller.hpp>

#include <kvferry/detail/process.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The threads that run a channel's I/O and its unbound handlers, for channels that weren't given an executor.
class IoThreads {
 public:
  IoThreads(std::size_t count, PollPolicy poll);
  IoThreads(const IoThreads&) = delete;
  IoThreads& operator=(const IoThreads&) = delete;
  ~IoThreads();

  /// Runs the remaining work, then joins. May be called again, but not on one of the threads.
  void finish();

  [[nodiscard]] const std::shared_ptr<Poller>& poller() const noexcept { return poller_; }
  [[nodiscard]] asio::io_context::executor_type executor() { return context_.get_executor(); }
  /// Whether the calling thread is one of them.
  [[nodiscard]] bool run_this_one() { return context_.get_executor().running_in_this_thread(); }

 private:
  /// @param passed this thread's own.
  void run(const std::shared_ptr<std::atomic<bool>>& passed);
  /// If a handler has forked and returns in the child, this is the child's only thread; it must not take the parent's
  /// events.
  void end_forked_child() const;

  const ProcessOfOrigin origin_;
  const std::shared_ptr<Poller> poller_;
  asio::io_context context_;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work_;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_IO_THREADS_HPP
