// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/region_removals.hpp>

#include <asio/post.hpp>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

#include <kvferry/kit/fence.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Whether an operation has an object in a region.
KVFERRY_INLINE bool uses(const TransferRequest& request, const MemoryRegion& region) {
  // Memory of several regions of the caller's may be compared: as numbers.
  const auto begin = reinterpret_cast<std::uintptr_t>(region.data);
  const std::uintptr_t end = begin + region.size;
  return std::ranges::any_of(request.objects, [&](const MutableBuffer& object) {
    const auto first = reinterpret_cast<std::uintptr_t>(object.data());
    return !object.empty() && first < end && first + object.size() > begin;
  });
}

}  // namespace internal

/// One region on its way out. The waits are counted; each link that has been asked is released once: by its answer, or
/// by whoever shuts it, with which nothing of it touches the region either.
class RegionRemovals::Removal final : public Expirable, public std::enable_shared_from_this<Removal> {
 public:
  Removal(std::shared_ptr<RegionRemovals> all, std::uint32_t number, std::weak_ptr<PeerDirectory> peers)
      : all_(std::move(all)), number_(number), peers_(std::move(peers)) {}

  /// To be called with the lock of all removals held, which no removal that ends has passed yet.
  /// @return whether the removal has to be begun, which nobody else does.
  [[nodiscard]] bool add(const std::shared_ptr<PlainCall>& call, Clock::time_point deadline) {
    const std::lock_guard lock(mutex_);
    std::erase_if(calls_, [](const auto& waiting) { return waiting->ended(); });
    calls_.push_back(call);
    try {
      expire_at(deadline);
    } catch (...) {
      all_->deadlines_->remove(deadline, *this);
      calls_.pop_back();
      throw;
    }
    return !std::exchange(begun_, true);
  }

  /// There is no such region.
  void drop() {
    const std::lock_guard lock(mutex_);
    disarm();
  }

  void is_of(const LocalRegion& region) {
    const std::lock_guard lock(mutex_);
    region_ = region;
  }

  /// Asks whoever may touch the region.
  void begin() {
    try {
      ask_all();
    } catch (const std::exception&) {
      // Memory is used up: not everybody has been asked. The next call asks anew.
      const std::lock_guard lock(mutex_);
      incomplete_ = true;
    }
    bool late = false;
    {
      const std::lock_guard lock(mutex_);
      late = gave_up_;
    }
    if (late) {
      expire();  // those that have been asked since
    }
    release(Where::on_the_callers_thread);
  }

  /// The channel's links have been shut, and its operations have ended: nothing is to be waited for any more.
  void close() {
    while (break_asked({}, "the channel was closed, and nobody had said")) {
    }
    bool held = false;
    {
      const std::lock_guard lock(mutex_);
      held = std::exchange(waits_for_close_, false);
    }
    if (held) {
      release(Where::anywhere);
    }
    end_if_posted();
  }

  /// The awaited operation ends with its connection, or as if it had been cancelled.
  void expire() override {
    {
      const std::lock_guard lock(mutex_);
      gave_up_ = true;
      deadline_.reset();
    }
    while (break_asked({}, "the peer did not confirm in time")) {
    }
    std::optional<std::uint64_t> last_operation;
    LocalRegion region;
    {
      const std::lock_guard lock(mutex_);
      last_operation = last_operation_;
      region = region_;
    }
    if (last_operation) {
      all_->operations_->stop([&region](const TransferRequest& request) { return uses(request, region); },
                              errc::cancelled, *last_operation);
    }
  }

 private:
  struct Asked {
    std::string peer_id;
    std::weak_ptr<Link> link;
  };
  enum class Where { anywhere, on_the_callers_thread };

  class Breaking final : public Expirable {
   public:
    Breaking(std::weak_ptr<Removal> removal, std::uint64_t number) : removal_(std::move(removal)), number_(number) {}
    void expire() override {
      if (const auto removal = removal_.lock()) {
        (void)removal->break_asked(number_, "the question was lost");
      }
    }

   private:
    const std::weak_ptr<Removal> removal_;  // by which the queue, which it is in, is held
    const std::uint64_t number_;
  };

  /// With the lock held. Only the earliest deadline counts: by then all is done that can be.
  void expire_at(Clock::time_point deadline) {
    if (!gave_up_ && (!deadline_ || deadline < *deadline_)) {
      all_->deadlines_->add(deadline, shared_from_this());
      disarm();
      deadline_ = deadline;
    }
  }
  void disarm() {
    if (deadline_) {
      all_->deadlines_->remove(*deadline_, *this);
      deadline_.reset();
    }
  }

  void ask_all() {
    const auto peers = peers_.lock();
    const auto links = peers ? peers->all_links() : std::nullopt;
    if (!links) {
      wait_for_close();
    } else {
      for (const auto& [peer_id, link] : *links) {
        ask(peer_id, link);
      }
    }
    LocalRegion region;
    {
      const std::lock_guard lock(mutex_);
      region = region_;
      ++left_;
    }
    try {
      const std::uint64_t last =
          all_->operations_->when_ended([region](const TransferRequest& request) { return uses(request, region); },
                                        [self = shared_from_this()] { self->release(Where::anywhere); });
      const std::lock_guard lock(mutex_);
      last_operation_ = last;
    } catch (...) {
      release(Where::anywhere);  // not the last: `begin` holds as well
      throw;
    }
  }

  /// The closing channel sees to it that nothing touches the region, and may not have done so yet.
  void wait_for_close() {
    const std::lock_guard all_lock(all_->mutex_);
    const std::lock_guard lock(mutex_);
    cause_ = errc::closed;
    if (!all_->closed_ && !waits_for_close_) {
      waits_for_close_ = true;
      ++left_;
    }
  }

  void ask(const std::string& peer_id, const std::shared_ptr<Link>& link) {
    std::uint64_t number = 0;
    {
      const std::lock_guard lock(mutex_);
      number = ++last_asked_;
      asked_.emplace(number, Asked{peer_id, link});
      ++left_;
    }
    bool asks = false;
    try {
      const auto answer = std::make_shared<LinkAnswer>([self = shared_from_this(), number] { self->answered(number); },
                                                       [self = shared_from_this(), number] { self->lost(number); });
      asks = link->region_removed(number_, [answer] { answer->comes(); });
      if (!asks) {
        answer->is_not_to_come();
      }
    } catch (const std::exception&) {
      // Memory is used up. The link may have been asked, or not.
    }
    if (!asks) {
      (void)break_asked(number, "the transport can't ask the peer");
    }
  }

  void answered(std::uint64_t number) {
    decltype(asked_)::node_type node;
    {
      const std::lock_guard lock(mutex_);
      node = asked_.extract(number);
    }
    if (!node.empty()) {
      release(Where::anywhere);
    }
  }

  /// The caller that brings the news may hold locks of the link's.
  void lost(std::uint64_t number) noexcept {
    try {
      all_->deadlines_->add(Clock::now(), std::make_shared<Breaking>(weak_from_this(), number));
    } catch (const std::exception&) {
      // Memory is used up: at the deadline, then.
    }
  }

  /// @param number unset: any. @return whether there was one that has not answered.
  bool break_asked(std::optional<std::uint64_t> number, const char* why) {
    decltype(asked_)::node_type node;
    {
      const std::lock_guard lock(mutex_);
      const auto it = number ? asked_.find(*number) : asked_.begin();
      if (it == asked_.end()) {
        return false;
      }
      node = asked_.extract(it);
    }
    if (const auto link = node.mapped().link.lock()) {
      try {
        if (const auto peers = peers_.lock()) {
          peers->break_link(node.mapped().peer_id, *link, errc::connection_lost,
                            std::string(why) + " that region " + std::to_string(number_) + " is gone");
        }
      } catch (const std::exception&) {
        link->shut(errc::connection_lost, {});  // memory is used up
      }
    }
    release(Where::anywhere);
    return true;
  }

  void release(Where where) {
    {
      const std::lock_guard lock(mutex_);
      if (--left_ != 0) {
        return;
      }
    }
    if (!all_->forget_ || where == Where::on_the_callers_thread) {
      end();
      return;
    }
    {
      const std::lock_guard all_lock(all_->mutex_);
      const std::lock_guard lock(mutex_);
      posted_ = true;
      if (all_->closed_) {
        where = Where::on_the_callers_thread;  // nobody may run the executor any more
      }
    }
    if (where == Where::on_the_callers_thread) {
      end_if_posted();
      return;
    }
    // The work takes its time, and the caller that brought the news may hold locks.
    try {
      asio::post(all_->executor_, [self = shared_from_this()] { self->end_if_posted(); });
    } catch (const std::exception&) {
      end_if_posted();  // memory is used up
    }
  }

  /// Called by the posted function and by the channel's close, after which that may never run. The first call counts.
  void end_if_posted() {
    {
      const std::lock_guard lock(mutex_);
      if (!std::exchange(posted_, false)) {
        return;
      }
    }
    end();
  }

  void end() {
    bool complete = false;
    {
      const std::lock_guard lock(mutex_);
      complete = !incomplete_;
    }
    if (complete) {
      forget();
      all_->ended(number_);  // from here on no call joins
    }
    std::vector<std::shared_ptr<PlainCall>> calls;
    std::error_code cause;
    {
      const std::lock_guard lock(mutex_);
      calls.swap(calls_);
      cause = complete ? cause_ : std::make_error_code(std::errc::not_enough_memory);
      disarm();
      begun_ = false;
      incomplete_ = false;
      gave_up_ = false;
      last_operation_.reset();
      left_ = 1;
    }
    for (const auto& call : calls) {
      call->end(cause);
    }
  }

  void forget() noexcept {
    if (all_->forget_) {
      try {
        all_->forget_(number_);
      } catch (...) {
        detail::log_exception("forgetting a region");
      }
    }
  }

  const std::shared_ptr<RegionRemovals> all_;
  const std::uint32_t number_;
  const std::weak_ptr<PeerDirectory> peers_;

  std::mutex mutex_;
  LocalRegion region_;
  bool begun_ = false;
  std::size_t left_ = 1;  ///< Of those that are waited for; one is `begin`.
  std::uint64_t last_asked_ = 0;
  std::map<std::uint64_t, Asked> asked_;
  std::optional<std::uint64_t> last_operation_;  ///< Later ones of this side's are none of the removal's.
  std::optional<Clock::time_point> deadline_;    ///< Of the calls, also of cancelled ones.
  bool gave_up_ = false;
  bool incomplete_ = false;
  bool waits_for_close_ = false;  ///< One of those that are waited for.
  bool posted_ = false;           ///< The end, and nobody has run it.
  std::vector<std::shared_ptr<PlainCall>> calls_;
  std::error_code cause_;
};

KVFERRY_INLINE void RegionRemovals::remove(std::uint32_t number, Clock::time_point deadline,
                                           RemoveRegionCompletion completion,
                                           const std::shared_ptr<PeerDirectory>& peers) {
  const auto call = std::make_shared<PlainCall>(std::move(completion), deadlines_);
  call->accept_cancellation();
  std::shared_ptr<Removal> begun;
  std::error_code refused;
  try {
    const std::lock_guard lock(mutex_);
    if (const auto it = removals_.find(number); it != removals_.end()) {
      if (!it->second->add(call, deadline)) {
        return;
      }
      begun = it->second;
    } else {
      begun = enter(number, deadline, call, peers, refused);
    }
  } catch (const std::bad_alloc&) {
    refused = std::make_error_code(std::errc::not_enough_memory);
  }
  if (begun) {
    begun->begin();
  } else {
    call->end(refused);
  }
}

/// The table changes last: if memory is used up, there has been no removal.
KVFERRY_INLINE std::shared_ptr<RegionRemovals::Removal> RegionRemovals::enter(
    std::uint32_t number, Clock::time_point deadline, const std::shared_ptr<PlainCall>& call,
    const std::shared_ptr<PeerDirectory>& peers, std::error_code& refused) {
  auto removal = std::make_shared<Removal>(shared_from_this(), number, peers);
  const auto entry = removals_.emplace(number, removal).first;
  std::optional<LocalRegion> region;
  try {
    (void)removal->add(call, deadline);
    errc refusal{};
    region = table_->remove(number, refusal);
    if (!region) {
      refused = refusal;
    }
  } catch (...) {
    removal->drop();
    removals_.erase(entry);
    throw;
  }
  if (!region) {
    removal->drop();
    removals_.erase(entry);
    return nullptr;
  }
  removal->is_of(*region);
  return removal;
}

KVFERRY_INLINE void RegionRemovals::close() {
  for (std::uint64_t next = 0;;) {
    std::shared_ptr<Removal> removal;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      const auto it = std::ranges::find_if(removals_, [&](const auto& entry) { return entry.first >= next; });
      if (it == removals_.end()) {
        return;
      }
      removal = it->second;
      next = std::uint64_t{it->first} + 1;
    }
    removal->close();
  }
}

KVFERRY_INLINE void RegionRemovals::ended(std::uint32_t number) {
  std::shared_ptr<Removal> removal;  // not to be let go with the lock held
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = removals_.find(number); it != removals_.end()) {
      removal = std::move(it->second);
      removals_.erase(it);
    }
  }
  table_->gone();
}

}  // namespace kvferry::kit
