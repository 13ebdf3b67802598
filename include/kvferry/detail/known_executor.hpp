// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/execution/outstanding_work.hpp>
#include <asio/io_context.hpp>
#include <asio/require.hpp>
#include <asio/strand.hpp>
#include <asio/thread_pool.hpp>

#include <concepts>
#include <exception>
#include <type_traits>
#include <typeinfo>
#include <utility>

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

template <class... Listed>
struct Types {};

/// An executor that counts as work of its context (`asio::execution::outstanding_work.tracked`), as work guards have it.
template <class Executor>
using Tracking =
    std::decay_t<decltype(asio::require(std::declval<const Executor&>(), asio::execution::outstanding_work.tracked))>;

/// @return whether there was an executor to call it with.
template <class Executor, class Function>
bool call_with(const Executor* known, Function& function) {
  if (known != nullptr) {
    function(*known);
  }
  return known != nullptr;
}

/// With the executor that is hidden, if it is one of these, or a strand of one, or a strand of that.
template <class Function, class... Executors>
bool call_with_one_of(const asio::any_io_executor& executor, Function& function, Types<Executors...> /*these*/) {
  return (call_with(known_executor<Executors>(executor), function) || ...) ||
         (call_with(known_executor<asio::strand<Executors>>(executor), function) || ...) ||
         (call_with(known_executor<asio::strand<asio::strand<Executors>>>(executor), function) || ...);
}

/// Calls `function` with the executor that `executor` hides, if it is one of Asio's contexts, or a strand of one, or a strand of that.
/// @return whether it has been called.
template <class Function>
bool with_context_executor(const asio::any_io_executor& executor, Function function) {
  using Context = asio::io_context::executor_type;
  using Pool = asio::thread_pool::executor_type;
  return call_with_one_of(executor, function, Types<Context, Pool, Tracking<Context>, Tracking<Pool>>());
}

template <class Executor>
[[nodiscard]] bool context_runs_in_this_thread(const Executor& executor) noexcept {
  return executor.running_in_this_thread();
}
/// The threads are meant that run the strand, whether or not they do so now.
template <class Executor>
[[nodiscard]] bool context_runs_in_this_thread(const asio::strand<Executor>& strand) noexcept {
  return context_runs_in_this_thread(strand.get_inner_executor());
}

/// Whether the calling thread runs what is posted to `executor`, or to the context that it is a strand of, as far as its type is one of
/// Asio's that tell.
[[nodiscard]] inline bool runs_in_this_thread(const asio::any_io_executor& executor) noexcept {
  if (const auto* strand = known_executor<asio::strand<asio::any_io_executor>>(executor)) {
    return runs_in_this_thread(strand->get_inner_executor());
  }
  bool runs = false;
  with_context_executor(executor, [&](const auto& known) { runs = context_runs_in_this_thread(known); });
  return runs;
}

}  // namespace kvferry::detail
