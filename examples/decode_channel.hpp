// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp_transfer_channel.hpp>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "messages.hpp"
#include "paged_cache.hpp"

namespace example {

/// Decode's channel: a TCP channel that answers messages of its user's own. It takes one cache.
///
/// No message may meet a half-made or half-destroyed object: so messages are held until the end of the constructor, and
/// the most derived class closes in its destructor.
class DecodeChannel final : public kvferry::TcpTransferChannel {
 public:
  /// @param pool where an offered cache gets its pages from; must outlive the channel.
  DecodeChannel(kvferry::TcpOptions options, PagePool& pool);
  ~DecodeChannel() override;

  /// Waits for a prefill peer and the cache that it offers. @throws Failure
  [[nodiscard]] CacheOffer wait_for_offer(std::chrono::milliseconds limit);

  /// The pages that were taken for the cache; to be called after `wait_for_offer`.
  [[nodiscard]] const PagedCache& cache() const;

  /// Waits until prefill has sent all of its page table, and got decode's. @throws Failure
  std::vector<std::uint64_t> wait_for_page_table(std::chrono::milliseconds limit);

  kvferry::SideMessage handle_init_side_msg(const kvferry::SideMessage& message) override;

  /// Also wakes those who wait for an offer or a page table.
  void close() override;

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

}  // namespace example
