// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/logger.hpp>
#include <kvferry/side_message.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "messages.hpp"
#include "paged_cache.hpp"

namespace example {

/// Decode's side of the agreement about the cache: takes the messages in which a prefill peer offers one, and what
/// belongs to it. It takes one cache.
class CacheDesk {
 public:
  /// @param pool where an offered cache gets its pages from; must outlive the desk.
  explicit CacheDesk(PagePool& pool) : pool_(pool) {}

  /// Waits for a prefill peer and the cache that it offers. @throws Failure
  [[nodiscard]] CacheOffer wait_for_offer(std::chrono::milliseconds limit);

  /// The pages that were taken for the cache; to be called after `wait_for_offer`.
  [[nodiscard]] const PagedCache& cache() const;

  /// Waits until prefill has sent all of its page table, and got decode's. @throws Failure
  std::vector<std::uint64_t> wait_for_page_table(std::chrono::milliseconds limit);

  /// @return nothing for messages that are none of those.
  [[nodiscard]] std::optional<kvferry::SideMessage> answer(const kvferry::SideMessage& message);

  /// Wakes those who wait for an offer or a page table.
  void close();

 private:
  CacheAccepted take_offer(CacheOffer offer);
  PageTablePart exchange(const PageTablePart& part);

  template <class Arrived>
  void wait(std::unique_lock<std::mutex>& lock, std::chrono::milliseconds limit, std::string_view what,
            Arrived arrived);

  PagePool& pool_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool closed_ = false;
  std::optional<CacheOffer> offer_;
  std::optional<PagedCache> cache_;
  std::vector<std::uint64_t> prefill_indexes_;
};

/// Decode's channel, of any transport: one that answers messages of its user's own.
///
/// No message may meet a half-made or half-destroyed object: so messages are held until the end of the constructor, and
/// the most derived class closes in its destructor.
template <class Transport>
class DecodeChannel final : public Transport {
 public:
  template <class Options>
  DecodeChannel(Options options, CacheDesk& desk)
      : Transport(with_side_messages_held(std::move(options))), desk_(desk) {
    this->answer_side_messages();
  }
  ~DecodeChannel() override { DecodeChannel::close(); }

  kvferry::SideMessage handle_init_side_msg(const kvferry::SideMessage& message) override {
    auto answer = desk_.answer(message);
    return answer ? *std::move(answer) : Transport::handle_init_side_msg(message);
  }

  void close() override {
    kvferry::kit::refuse_in_log_sink("close()");
    desk_.close();
    Transport::close();
  }

 private:
  template <class Options>
  static Options with_side_messages_held(Options options) {
    options.hold_side_messages = true;
    return options;
  }

  CacheDesk& desk_;
};

}  // namespace example
