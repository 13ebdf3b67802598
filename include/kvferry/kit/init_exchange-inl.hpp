// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/init_exchange.hpp>

#include <exception>
#include <new>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/log.hpp>

#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void InitExchange::finish(const Failure& failure, std::optional<SideMessage> answer) {
  finish(failure, std::move(answer), false);
}

KVFERRY_INLINE void InitExchange::finish(const Failure& failure, std::optional<SideMessage> answer, bool stopped) {
  if (ended_.exchange(true)) {
    return;
  }
  if (failure && request_.diagnostic != nullptr) {
    try {
      const std::string who = request_.peer_id.empty() ? std::string() : "peer " + in_quotes(request_.peer_id) + ", ";
      *request_.diagnostic = who + printable(request_.peer_init_url) + ": " +
                             (failure.sentence.empty() ? failure.code.message() : failure.sentence);
    } catch (const std::exception&) {
      request_.diagnostic->clear();  // there is no memory for a sentence, but an end there is
    }
  }
  auto completion = std::move(completion_);
  owner_->remove(*this);
  if (stopped) {
    owner_->stopped_waiting(request_.peer_id);  // before its caller may call again, who would join what is to end
  }
  completion(failure.code, std::move(answer));
}

KVFERRY_INLINE void InitExchange::accept_cancellation() {
  if (completion_.cancellable()) {
    completion_.on_cancel(cancellation(owner_->gate(), weak_from_this(), [](InitExchange& exchange) {
      exchange.stop({errc::cancelled, {}});
    }));
  }
}

KVFERRY_INLINE void InitExchange::expire() {
  const auto given = request_.timeout.value_or(std::chrono::milliseconds::zero());
  const std::string awaited = owner_->awaited(request_.peer_id);
  stop({errc::timed_out, "no usable connection or answer within the " + std::to_string(given.count()) +
                             " ms that the call was given" + (awaited.empty() ? awaited : ": " + awaited)});
}

KVFERRY_INLINE void InitExchange::stop(const Failure& failure) { finish(failure, {}, true); }

KVFERRY_INLINE std::shared_ptr<InitExchange> InitExchanges::begin(InitRequest request, SideMessageCompletion completion,
                                                                  Clock::time_point deadline) {
  auto exchange =
      std::make_shared<InitExchange>(std::move(request), std::move(completion), deadline, shared_from_this());
  exchange->accept_cancellation();  // while nobody else can end it
  bool refused = false;
  {
    const std::lock_guard lock(mutex_);
    refused = closed_;
    if (!refused) {
      pending_.emplace(exchange.get(), exchange);
    }
  }
  if (refused) {
    exchange->finish({errc::closed, {}});
    return nullptr;
  }
  try {
    deadlines_->add(deadline, exchange);
  } catch (const std::bad_alloc&) {
    exchange->finish({std::make_error_code(std::errc::not_enough_memory), {}});
    return nullptr;
  }
  if (exchange->ended()) {
    remove(*exchange);  // cancelled before it was entered
  }
  return exchange;
}

KVFERRY_INLINE void InitExchanges::remove(const InitExchange& exchange) {
  deadlines_->remove(exchange.deadline(), exchange);
  std::shared_ptr<InitExchange> removed;
  const std::lock_guard lock(mutex_);
  if (const auto it = pending_.find(&exchange); it != pending_.end()) {
    removed = std::move(it->second);
    pending_.erase(it);
  }
}

KVFERRY_INLINE void InitExchanges::close() {
  std::vector<std::shared_ptr<InitExchange>> all;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    for (const auto& [key, exchange] : pending_) {
      all.push_back(exchange);
    }
  }
  for (const auto& exchange : all) {
    exchange->finish({errc::closed, {}});
  }
}

}  // namespace kvferry::kit
