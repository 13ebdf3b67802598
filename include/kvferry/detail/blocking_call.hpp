// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_DETAIL_BLOCKING_CALL_HPP
#define KVFERRY_DETAIL_BLOCKING_CALL_HPP

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/config.hpp>
#include <kvferry/error.hpp>

#include <kvferry/kit/logger.hpp>

/// The blocking forms of calls, made of the asynchronous ones.
namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

/// Where a blocking call waits for its completion. Shared with the handler, which may still be leaving `complete` when
/// the waiting thread has gone on.
template <class... Results>
class Waiter {
 public:
  void complete(Results... results) {
    const std::lock_guard lock(mutex_);
    results_.emplace(std::move(results)...);
    ready_.notify_one();
  }

  std::tuple<Results...> wait() {
    std::unique_lock lock(mutex_);
    ready_.wait(lock, [&] { return results_.has_value(); });
    return std::move(*results_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::optional<std::tuple<Results...>> results_;
};

/// Starts an operation with a handler that wakes this thread, and waits for it.
template <class Result, class Start>
Result wait_for(Start start, std::error_code& ec) {
  auto waiter = std::make_shared<Waiter<std::error_code, Result>>();
  start(CompletionHandler<void(std::error_code, Result)>::direct(
      [waiter](std::error_code code, Result result) { waiter->complete(code, std::move(result)); }));
  auto [code, result] = waiter->wait();
  ec = code;
  return std::move(result);
}

/// As above, for an operation that has no result.
template <class Start>
void wait_for_end(Start start, std::error_code& ec) {
  const auto waiter = std::make_shared<Waiter<std::error_code>>();
  start(CompletionHandler<void(std::error_code)>::direct([waiter](std::error_code code) { waiter->complete(code); }));
  ec = std::get<0>(waiter->wait());
}

inline std::string sentence(const std::string& diagnostic, std::string_view what) {
  return diagnostic.empty() ? std::string(what) : diagnostic;
}

/// The throwing form of a call that may write a diagnostic: `call(spec, ec)`.
template <class Spec, class Call>
auto or_throw(const Spec& spec, std::string_view what, Call call) {
  std::string own;
  Spec with_diagnostic = spec;
  if (with_diagnostic.diagnostic == nullptr) {
    with_diagnostic.diagnostic = &own;
  }
  std::error_code ec;
  const auto thrown = [&] { return TransferError(ec, sentence(*with_diagnostic.diagnostic, what)); };
  if constexpr (std::is_void_v<decltype(call(with_diagnostic, ec))>) {
    call(with_diagnostic, ec);
    if (ec) {
      throw thrown();
    }
  } else {
    auto result = call(with_diagnostic, ec);
    if (ec) {
      throw thrown();
    }
    return result;
  }
}

/// Says that a blocking call was made where it could never end.
inline std::error_code refuse_to_block(std::string* diagnostic) {
  if (diagnostic != nullptr) {
    *diagnostic = kit::in_log_sink()
                      ? "a blocking call in a log sink may wait for the thread that the sink was called on"
                      : "a blocking call on a thread that runs the channel's executor would wait for itself";
  }
  return errc::would_deadlock;
}

}  // namespace internal
}  // namespace kvferry

#endif  // KVFERRY_DETAIL_BLOCKING_CALL_HPP
