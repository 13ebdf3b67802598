// SPDX-License-Identifier: Apache-2.0
// A rail's reactions to the inbox.
#include <asio/post.hpp>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>

#include "rail.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

void Rail::apply(Inbox& taken) {
  if (taken.continuation) {
    continuation_posted_ = false;
  }
  if ((taken.event || taken.woken) && !failed_ && !leaving_) {
    waiting_ = waiting_ && !taken.event;
    armed_ = false;
    pair_->take_events();
  }
  if (taken.trouble && !failed_ && !held_) {
    // Completions say more of the cause.
    catch_up();
    fail(taken.trouble.code, path() + ": " + taken.trouble.sentence);
  }
  if (taken.timer) {
    timer_at_.reset();
    check_timer();
  }
  apply_regions(taken);
  for (auto& start : taken.starts) {
    if (protocol_) {
      protocol_->start(std::move(start.batch), start.range, std::move(start.preparation));
    } else {
      (void)start.batch->part_done(failure_, failure_why_);  // only a rail that broke before it was joined gets here
    }
  }
  if (!failed_) {
    std::ranges::move(taken.probes, std::back_inserter(probes_));
  }
  if (!taken.stops.empty() && protocol_) {
    // Requests that have completed already count.
    catch_up();
    for (const auto& operation : taken.stops) {
      protocol_->stop(*operation);
    }
  }
  for (auto& done : taken.fences) {
    if (protocol_) {
      protocol_->fence(std::move(done));
    } else {
      std::exchange(done, nullptr)();
    }
  }
  if (taken.ended_fences != 0 && !failed_) {
    awaited_fences_ -= std::min(awaited_fences_, taken.ended_fences);
    protocol_->begin_fences(taken.ended_fences);
  }
}

/// News go first: what is started here later may speak of them.
void Rail::apply_regions(Inbox& taken) {
  if (taken.region_added && protocol_) {
    protocol_->region_added();
  }
  for (auto& [number, done] : taken.removed_regions) {
    if (protocol_) {
      protocol_->region_removed(number, std::move(done));
    } else {
      std::exchange(done, nullptr)();
    }
  }
  for (auto& done : taken.region_questions) {
    if (protocol_) {
      protocol_->ask_regions(std::move(done));
    }
  }
}

/// Of fences that have come: for the writes that this side had started by then, on whatever rail or on their way to
/// one. Not by the thread that is told of their end, which may hold locks.
void Rail::await_writes() {
  if (failed_ || phase_ != Phase::running || protocol_->fences_asked() <= awaited_fences_) {
    return;
  }
  const std::size_t fences = protocol_->fences_asked() - awaited_fences_;
  awaited_fences_ += fences;
  host_->when_writes_ended([weak = weak_from_this(), executor = executor_, fences] {
    try {
      asio::post(executor, [weak, fences] {
        if (const auto self = weak.lock()) {
          self->driver_.put([fences](Inbox& inbox) { inbox.ended_fences += fences; });
          self->drive(callers_turn);
        }
      });
    } catch (const std::exception&) {
      // Memory is used up: whoever drives the rail next finds it.
      if (const auto self = weak.lock()) {
        self->driver_.put([fences](Inbox& inbox) { inbox.ended_fences += fences; });
      }
    }
  });
}

/// Ends all that the driver had in hand, else nobody would end it.
void Rail::give_up(Inbox& taken, const char* what) {
  fail(errc::connection_lost, what);
  if (protocol_) {
    protocol_->fail(failure_, {});  // where `fail` is what didn't get through
  }
  for (const auto& start : taken.starts) {
    if (start.batch) {
      (void)start.batch->part_done(failure_, {});
    }
  }
  for (const auto& done : taken.fences) {
    if (done) {
      done();
    }
  }
  for (const auto& [number, done] : taken.removed_regions) {
    if (done) {
      done();
    }
  }
}

}  // namespace kvferry::rdma
