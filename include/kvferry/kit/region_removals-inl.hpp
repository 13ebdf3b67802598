// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/region_removals.hpp>

#include <asio/post.hpp>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

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

/// A call that waits for a removal.
class RegionRemovals::Call final : public PlainCall {
 public:
  Call(RemoveRegionCompletion completion, Clock::time_point deadline, std::shared_ptr<DeadlineQueue> deadlines)
      : PlainCall(std::move(completion), std::move(deadlines)), deadline_(deadline) {}

  /// @param give_up ends what the removal waits for.
  void wait(std::function<void()> give_up) {
    give_up_ = std::move(give_up);
    deadlines_->add(deadline_, shared_from_this());
    if (ended()) {
      deadlines_->remove(deadline_, *this);  // perhaps before it was added
    }
  }

  void expire() override {
    if (!ended()) {
      give_up_();
    }
  }

 private:
  void before_end() override { deadlines_->remove(deadline_, *this); }

  const Clock::time_point deadline_;
  std::function<void()> give_up_;
};

class RegionRemovals::Removal final : public std::enable_shared_from_this<Removal> {
 public:
  Removal(std::shared_ptr<RegionRemovals> all, LocalRegion region) : all_(std::move(all)), region_(region) {}

  void add(const std::shared_ptr<Call>& call) {
    {
      const std::lock_guard lock(mutex_);
      calls_.push_back(call);
    }
    // Not kept by the call, which it keeps.
    call->wait([weak = weak_from_this()] {
      if (const auto self = weak.lock()) {
        self->give_up();
      }
    });
  }

  /// Asks whoever may touch the region. To be called once.
  void begin(const std::shared_ptr<PeerDirectory>& peers) {
    peers_ = peers;
    const auto links = peers->all_links();
    if (!links) {
      refuse(errc::closed);  // the closing channel sees to it that nothing touches the region
    } else {
      for (const auto& [peer_id, link] : *links) {
        ask(peer_id, link);
      }
    }
    hold();
    all_->operations_->when_ended([region = region_](const TransferRequest& request) { return uses(request, region); },
                                  [self = shared_from_this()] { self->release(Where::anywhere); });
    release(Where::on_the_callers_thread);
  }

 private:
  struct Asked {
    std::string peer_id;
    std::weak_ptr<Link> link;
  };
  enum class Where { anywhere, on_the_callers_thread };

  void ask(const std::string& peer_id, const std::shared_ptr<Link>& link) {
    std::uint64_t number = 0;
    {
      const std::lock_guard lock(mutex_);
      ++left_;
      number = ++last_asked_;
      asked_.emplace(number, Asked{peer_id, link});
    }
    const bool asks = link->region_removed(region_.number, [self = shared_from_this(), number] {
      {
        const std::lock_guard lock(self->mutex_);
        self->asked_.erase(number);
      }
      self->release(Where::anywhere);
    });
    if (!asks) {
      {
        const std::lock_guard lock(mutex_);
        asked_.erase(number);
      }
      break_link(peer_id, *link, "the transport can't ask the peer");
      release(Where::anywhere);
    }
  }

  void hold() {
    const std::lock_guard lock(mutex_);
    ++left_;
  }

  /// What is waited for ends with its connection, or as if it had been cancelled.
  void give_up() {
    std::vector<Asked> unanswered;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& [number, asked] : asked_) {
        unanswered.push_back(asked);
      }
    }
    for (const Asked& asked : unanswered) {
      if (const auto link = asked.link.lock()) {
        break_link(asked.peer_id, *link, "the peer did not confirm in time");
      }
    }
    all_->operations_->stop([this](const TransferRequest& request) { return uses(request, region_); }, errc::cancelled);
  }

  void break_link(const std::string& peer_id, Link& link, const std::string& why) {
    if (const auto peers = peers_.lock()) {
      peers->break_link(peer_id, link, errc::connection_lost,
                        why + " that region " + std::to_string(region_.number) + " is gone");
    }
  }

  void refuse(std::error_code cause) {
    const std::lock_guard lock(mutex_);
    cause_ = cause;
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
    // What is to be done takes its time, and whoever brought the news may hold locks.
    try {
      asio::post(all_->executor_, [self = shared_from_this()] { self->end(); });
    } catch (const std::exception&) {
      end();  // memory is used up
    }
  }

  void end() {
    if (all_->forget_) {
      all_->forget_(region_.number);
    }
    all_->ended(region_.number);  // from here on no call joins
    std::vector<std::shared_ptr<Call>> calls;
    std::error_code cause;
    {
      const std::lock_guard lock(mutex_);
      calls.swap(calls_);
      cause = cause_;
    }
    for (const auto& call : calls) {
      call->end(cause);
    }
  }

  const std::shared_ptr<RegionRemovals> all_;
  const LocalRegion region_;
  std::weak_ptr<PeerDirectory> peers_;

  std::mutex mutex_;
  std::size_t left_ = 1;  ///< Of those that are waited for; one is `begin`.
  std::uint64_t last_asked_ = 0;
  std::map<std::uint64_t, Asked> asked_;
  std::vector<std::shared_ptr<Call>> calls_;
  std::error_code cause_;
};

KVFERRY_INLINE void RegionRemovals::remove(std::uint32_t number, Clock::time_point deadline,
                                           RemoveRegionCompletion completion,
                                           const std::shared_ptr<PeerDirectory>& peers) {
  const auto call = std::make_shared<Call>(std::move(completion), deadline, deadlines_);
  call->accept_cancellation();
  std::shared_ptr<Removal> begun;
  errc refusal{};
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = removals_.find(number); it != removals_.end()) {
      it->second->add(call);
      return;
    }
    if (const auto region = table_->remove(number, refusal)) {
      begun = std::make_shared<Removal>(shared_from_this(), *region);
      removals_.emplace(number, begun);
      begun->add(call);
    }
  }
  if (begun) {
    begun->begin(peers);
  } else {
    call->end(refusal);
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
