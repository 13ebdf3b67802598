// SPDX-License-Identifier: Apache-2.0
#include "decode_channel.hpp"

#include <fmt/core.h>
#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <algorithm>
#include <string>
#include <utility>

#include "cache_content.hpp"
#include "exit_code.hpp"

namespace example {
namespace {

[[noreturn]] void refuse(kvferry::errc code, const std::string& why) { throw kvferry::TransferError(code, why); }

}  // namespace

std::optional<kvferry::SideMessage> CacheDesk::answer(const kvferry::SideMessage& message) {
  if (message.is<CacheOffer>()) {
    return kvferry::encode_side_message(take_offer(kvferry::decode_side_message<CacheOffer>(message)));
  }
  if (message.is<PageTablePart>()) {
    return kvferry::encode_side_message(exchange(kvferry::decode_side_message<PageTablePart>(message)));
  }
  return std::nullopt;
}

// An exception here travels to prefill, whose call throws it. Nothing that a peer sends is taken on trust.
CacheAccepted CacheDesk::take_offer(CacheOffer offer) {
  const std::lock_guard lock(mutex_);
  if (offer_.has_value()) {
    refuse(kvferry::errc::resource_limit, "decode has taken a cache already");
  }
  if (offer.mode != mode_write && offer.mode != mode_read && offer.mode != mode_sendrecv) {
    refuse(kvferry::errc::malformed_message, "the offer's mode is none of write, read, sendrecv");
  }
  if (offer.checksum.size() != checksum_digits) {
    refuse(kvferry::errc::malformed_message,
           fmt::format("the offer's checksum has {} digits, not {}", offer.checksum.size(), checksum_digits));
  }
  if (offer.page_size != pool_.page_size()) {
    refuse(kvferry::errc::page_size_mismatch, fmt::format("the cache has pages of {} bytes, decode's pool of {} bytes",
                                                          offer.page_size, pool_.page_size()));
  }
  if (offer.pages_per_batch == 0) {
    refuse(kvferry::errc::malformed_message, "the offer's batches have 0 pages");
  }
  const auto page_count = pages_for(offer.bytes, offer.page_size);
  if (page_count > pool_.page_count()) {
    refuse(kvferry::errc::resource_limit, fmt::format("the cache has {} pages, decode's pool {} (see decode_peer "
                                                      "--pool-size)",
                                                      page_count, pool_.page_count()));
  }
  cache_.emplace(pool_, offer.bytes);
  offer_ = std::move(offer);
  changed_.notify_all();
  return {page_count};
}

PageTablePart CacheDesk::exchange(const PageTablePart& part) {
  const std::lock_guard lock(mutex_);
  const auto known = prefill_indexes_.size();
  const auto missing = cache_.has_value() ? cache_->page_count() - known : 0;
  if (part.first != known || part.indexes.size() > missing) {
    refuse(kvferry::errc::malformed_message,
           fmt::format("{} pages from page {} of the page table came where {} from page {} were missing",
                       part.indexes.size(), part.first, missing, known));
  }
  prefill_indexes_.insert(prefill_indexes_.end(), part.indexes.begin(), part.indexes.end());
  changed_.notify_all();
  const auto own =
      cache_.has_value() ? cache_->indexes().subspan(known, part.indexes.size()) : std::span<const std::uint64_t>{};
  return {part.first, {own.begin(), own.end()}};
}

template <class Arrived>
void CacheDesk::wait(std::unique_lock<std::mutex>& lock, std::chrono::milliseconds limit, std::string_view what,
                         Arrived arrived) {
  if (!changed_.wait_for(lock, limit, [&] { return closed_ || arrived(); })) {
    throw Failure(ExitCode::no_agreement, fmt::format("{} has not come from {} in {} s", what, prefill_id,
                                                      static_cast<double>(limit.count()) / 1000));
  }
  if (closed_) {
    throw Failure(ExitCode::no_agreement, "closed");
  }
}

CacheOffer CacheDesk::wait_for_offer(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  wait(lock, limit, "a cache", [this] { return offer_.has_value(); });
  return *offer_;
}

const PagedCache& CacheDesk::cache() const {
  const std::lock_guard lock(mutex_);
  return cache_.value();
}

std::vector<std::uint64_t> CacheDesk::wait_for_page_table(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  wait(lock, limit, "the page table", [this] { return prefill_indexes_.size() == cache_->page_count(); });
  return prefill_indexes_;
}

void CacheDesk::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

}  // namespace example
