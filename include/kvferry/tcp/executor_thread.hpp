// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/io_context.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Whether the executor runs the calling function. False, too, where Asio can't be asked: of executors of other kinds.
[[nodiscard]] inline bool runs_in_this_thread(const asio::any_io_executor& executor) {
  if (const auto* const context = executor.target<asio::io_context::executor_type>()) {
    return context->running_in_this_thread();
  }
  if (const auto* const strand = executor.target<asio::strand<asio::io_context::executor_type>>()) {
    return strand->running_in_this_thread();
  }
  const auto* const pool = executor.target<asio::thread_pool::executor_type>();
  return pool != nullptr && pool->running_in_this_thread();
}

}  // namespace kvferry::tcp
