// SPDX-License-Identifier: Apache-2.0
#include "rdma_link.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <exception>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/pause.hpp>

#include "checksums.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// How long a goodbye may take. Without one the peer finds out by itself, seconds later: so the process may stand still
/// for a moment in between.
constexpr std::chrono::milliseconds goodbye_time{200};
/// The same on a thread that has others to look after.
constexpr std::chrono::milliseconds hurried_goodbye_time{20};

/// A function that each of so many rails calls; the last call calls `done`.
std::function<void()> of_all(std::function<void()> done, std::size_t rails) {
  return [all = std::make_shared<std::function<void()>>(std::move(done)),
          left = std::make_shared<std::atomic<std::size_t>>(rails)] {
    if (--*left == 0) {
      (*all)();
    }
  };
}

}  // namespace

kit::LinkHandler RdmaLink::take_handler(std::shared_ptr<RdmaLink>& kept) {
  const std::lock_guard lock(joining_mutex_);
  kept = std::move(self_);
  timer_.cancel();
  return std::exchange(on_link_, nullptr);
}

void RdmaLink::rail_greeted() {
  {
    const std::lock_guard lock(joining_mutex_);
    if (++greeted_ != joined_.size()) {
      return;
    }
  }
  std::shared_ptr<RdmaLink> kept;
  const auto on_link = take_handler(kept);
  if (!on_link) {
    return;
  }
  // Handed over first, and welcoming then: when the peer learns that it is connected, this side is ready for it. And a
  // channel that is being closed finds the link, and shuts it.
  on_link({}, shared_from_this(), {});
  for (Rail* const rail : joined_) {
    rail->run();
  }
}

void RdmaLink::fail(std::error_code cause, const std::string& why) {
  std::shared_ptr<RdmaLink> kept;
  if (const auto on_link = take_handler(kept)) {
    end_rails(cause, why);
    on_link(cause, nullptr, why);
    deregister_aside();
  }
}

void RdmaLink::rail_breaking(std::error_code cause) {
  if (!failed_.exchange(true)) {
    host_->link_failed(*this, cause);
  }
}

void RdmaLink::rail_broken(std::error_code cause, const std::string& why) {
  fail(cause, why);
  end_rails(cause, why);
  deregister_aside();
}

void RdmaLink::start(std::shared_ptr<kit::Operation> operation) {
  const TransferRequest& request = operation->request();
  std::size_t rail = 0;
  if (joined_.size() > 1) {
    if (!request.one_sided()) {
      rail = static_cast<std::size_t>(request.tag % joined_rails_);
    } else {
      const std::size_t total = kit::LocalBytes(request).total();
      const std::size_t pairs = joined_.size() / joined_rails_;
      const bool over_rails = joined_rails_ > 1 && total >= options_.stripe_threshold;
      const bool over_pairs = pairs > 1 && total / (over_rails ? joined_rails_ : 1) >= options_.queue_pair_threshold;
      const bool in_parts = (over_rails || over_pairs) && request.objects.size() > 1 &&
                            !lands_on_itself(request, regions_->addresses_of_peers());
      if (!in_parts || !over_rails) {
        rail = joined_rails_ == 1 ? 0 : next_rail_.fetch_add(1, std::memory_order_relaxed) % joined_rails_;
      }
      if (in_parts) {
        const std::size_t step = over_rails ? 1 : joined_rails_;
        const auto ranges = kit::cut_into_stripes(kit::LocalBytes(request), total,
                                                  (over_rails ? joined_rails_ : 1) * (over_pairs ? pairs : 1));
        const auto batch = std::make_shared<kit::StripedOperation>(operation, ranges.size());
        for (std::size_t i = 0; i < ranges.size(); ++i) {
          joined_[rail + i * step]->start(batch, ranges[i]);
        }
        return;
      }
    }
  }
  const std::size_t count = request.objects.size();
  const bool serves = place_.is_of_this_thread() && !led_channel_;
  joined_[rail]->start(std::make_shared<kit::StripedOperation>(std::move(operation), 1), {0, count},
                       serves ? &led_channel_ : nullptr);
}

/// Each queue pair has writes of its own.
bool RdmaLink::fence(std::function<void()> done) {
  const auto one_has = of_all(std::move(done), joined_.size());
  for (Rail* const rail : joined_) {
    rail->fence(one_has);
  }
  return true;
}

void RdmaLink::region_added() {
  for (Rail* const rail : joined_) {
    rail->region_added();
  }
}

bool RdmaLink::region_removed(std::uint32_t number, std::function<void()> done) {
  if (host_->told_regions()->find(number) != nullptr) {
    const std::lock_guard lock(joining_mutex_);
    asked_regions_.push_back(number);
  }
  const auto one_has = of_all(std::move(done), joined_.size());
  for (Rail* const rail : joined_) {
    rail->region_removed(number, one_has);
  }
  return true;
}

/// On any rail: news have the keys of all.
void RdmaLink::ask_regions(std::function<void()> done) { joined_.front()->ask_regions(std::move(done)); }

void RdmaLink::regions_deregistered() {
  if (failed_) {
    return;
  }
  const auto told = host_->told_regions();
  const auto lost = std::ranges::find_if(told->all(), [&](const LocalRegion& region) {
    const std::lock_guard lock(joining_mutex_);
    return std::ranges::find(asked_regions_, region.number) == asked_regions_.end() &&
           !joined_.front()->domain()->keys_of(region.number);
  });
  if (lost != told->all().end()) {
    const std::string why = "region " + std::to_string(lost->number) + " was removed while the connection was made";
    rail_breaking(errc::connection_lost);
    rail_broken(errc::connection_lost, why);
  }
}

void RdmaLink::stop(std::shared_ptr<kit::Operation> operation) {
  for (Rail* const rail : joined_) {
    rail->stop(operation);
  }
}

/// First all rails' answers, then goodbye: a peer that hears it ends all rails.
bool RdmaLink::say_farewell(bool& answered) {
  answered = true;
  for (Rail* const rail : joined_) {
    answered = rail->say(Rail::Farewell::answers) && answered;
  }
  if (!answered) {
    return false;
  }
  bool done = true;
  for (Rail* const rail : joined_) {
    done = rail->say(Rail::Farewell::goodbye) && done;
  }
  return done;
}

std::optional<kit::Link::Pause> RdmaLink::take_leave() {
  const auto now = kit::Clock::now();
  if (!leaving_until_) {
    leaving_until_ = now + std::max(options_.rail.drain_timeout, goodbye_time);
    failed_ = true;
    for (const auto& rail : rails_) {
      rail->hold();
    }
    for (Rail* const rail : joined_) {
      rail->run();  // if the link was handed over only now: the peer has it as well, and is to hear of this
    }
  }
  bool answered = false;
  if (say_farewell(answered) || now >= *leaving_until_) {
    has_left_ = true;
    return std::nullopt;
  }
  if (answered) {
    leaving_until_ = std::min(*leaving_until_, now + goodbye_time);
  }
  return Pause{event_descriptors(), *leaving_until_};
}

std::vector<int> RdmaLink::event_descriptors() const {
  std::vector<int> all;
  for (Rail* const rail : joined_) {
    if (const int descriptor = rail->event_descriptor(); descriptor != -1) {
      all.push_back(descriptor);
    }
  }
  return all;
}

void RdmaLink::probe(std::function<void()> answered) {
  const auto once = [shared = std::make_shared<std::function<void()>>(std::move(answered)),
                     told = std::make_shared<std::atomic<bool>>(false)] {
    if (!told->exchange(true)) {
      (*shared)();
    }
  };
  for (Rail* const rail : joined_) {
    rail->probe(once);
  }
}

void RdmaLink::shut(std::error_code cause, const std::string& why) {
  end_rails(cause, why);
  deregister_own();
}

void RdmaLink::end_rails(std::error_code cause, const std::string& why) {
  failed_ = true;
  for (const auto& rail : rails_) {
    rail->hold();
  }
  if (!has_left_.exchange(true) && cause != errc::peer_closed) {
    kit::if_memory_lasts([&] {
      const auto until = kit::Clock::now() + hurried_goodbye_time;
      bool answered = false;
      while (!say_farewell(answered) && kit::Clock::now() < until) {
        const Pause pause{event_descriptors(), until};
        kit::wait_for({&pause, 1});
      }
    });
  }
  for (const auto& rail : rails_) {
    rail->shut(cause, why);
  }
}

void RdmaLink::deregister_own() {
  for (const auto& rail : rails_) {
    rail->deregister_own();
  }
}

void RdmaLink::deregister_aside() {
  const auto aside = options_.aside.lock();
  if (!aside || deregistering_.exchange(true)) {
    return;
  }
  try {
    aside->run_after_end([self = shared_from_this()] { self->deregister_own(); });
  } catch (const std::exception&) {
    // Memory is used up: with the link, then, or when it is shut.
  }
}

bool RdmaLink::begin_serving() { return joined_rails_ == 1 && place_.take(); }

void RdmaLink::serve(kit::BlockingWait& wait) {
  Rail& rail = *joined_.front();
  auto last_found = kit::Clock::now();
  bool may_sleep = false;
  while (led_channel_ && *led_channel_ && !wait.over()) {
    const auto found = rail.lead(may_sleep);
    if (found == Rail::Found::released) {
      break;
    }
    const auto now = kit::Clock::now();
    if (found == Rail::Found::something) {
      last_found = now;
      may_sleep = false;
    } else if (found == Rail::Found::busy || now - last_found <= options_.rail.spin) {
      may_sleep = false;
      std::this_thread::yield();
    } else if (!may_sleep) {
      may_sleep = true;  // once more, and events are asked for
    } else if (!place_.may_sleep()) {
      break;
    } else {
      std::array<pollfd, 2> waited{{{(*led_channel_)->fd, POLLIN, 0}, {wait.descriptor(), POLLIN, 0}}};
      if (!wait.over()) {
        ::poll(waited.data(), waited.size(), -1);
      }
      rail.woken();
      may_sleep = false;
    }
  }
}

void RdmaLink::end_serving() {
  if (led_channel_) {
    led_channel_.reset();
    joined_.front()->end_leading();
  }
  place_.leave();
}

std::string RdmaLink::path() const {
  std::string path = "rdma";
  for (const Rail* const rail : joined_) {
    path += (rail == joined_.front() ? " " : ", ") + rail->path();
  }
  return path;
}

}  // namespace kvferry::rdma
