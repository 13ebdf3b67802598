// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/io_context.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>

#include <concepts>
#include <exception>
#include <typeinfo>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::detail {

/// The executor that `executor` hides, if it is of this type, else null. (`any_io_executor::target` doesn't look at the
/// type: of another one it makes garbage.) Without `typeid`, only an `asio::io_context`'s is known.
template <class Executor>
[[nodiscard]] const Executor* known_executor([[maybe_unused]] const asio::any_io_executor& executor) noexcept {
#ifndef ASIO_NO_TYPEID
  if (executor.target_type() == typeid(Executor)) {
    return executor.target<Executor>();
  }
#else
  if constexpr (std::same_as<Executor, asio::io_context::executor_type>) {
    try {
      // Each type has an address then, which Asio tells of an executor only.
      static const void* const address = asio::any_io_executor(asio::io_context(1).get_executor()).target_type();
      if (executor.target_type() == address) {
        return executor.target<Executor>();
      }
    } catch (const std::exception&) {
      // There is no memory, or no descriptor, for a context at the moment.
    }
  }
#endif
  return nullptr;
}

/// Whether the calling thread runs what is posted to `executor`, as far as its type is one of Asio's that tell. Of a strand,
/// the threads are meant that run it, whether or not they do so now.
[[nodiscard]] inline bool runs_in_this_thread(const asio::any_io_executor& executor) noexcept {
  using Context = asio::io_context::executor_type;
  using Pool = asio::thread_pool::executor_type;
  if (const auto* context = known_executor<Context>(executor)) {
    return context->running_in_this_thread();
  }
  if (const auto* strand = known_executor<asio::strand<Context>>(executor)) {
    return strand->get_inner_executor().running_in_this_thread();
  }
  if (const auto* pool = known_executor<Pool>(executor)) {
    return pool->running_in_this_thread();
  }
  if (const auto* strand = known_executor<asio::strand<Pool>>(executor)) {
    return strand->get_inner_executor().running_in_this_thread();
  }
  if (const auto* strand = known_executor<asio::strand<asio::any_io_executor>>(executor)) {
    return runs_in_this_thread(strand->get_inner_executor());
  }
  return false;
}

}  // namespace kvferry::detail
