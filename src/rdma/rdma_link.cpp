// SPDX-License-Identifier: Apache-2.0
#include "rdma_link.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <exception>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/text.hpp>
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

/// Whether it is the host, rather than one of its rails, that lacks something.
bool is_of_host(std::error_code error) {
  return error == std::errc::not_enough_memory || error == std::errc::too_many_files_open ||
         error == std::errc::too_many_files_open_in_system;
}

}  // namespace

std::shared_ptr<RdmaLink> RdmaLink::create(const asio::any_io_executor& executor, const std::vector<RailPort>& ports,
                                           const LinkOptions& options) {
  std::shared_ptr<RdmaLink> link(new RdmaLink(executor, options));
  const std::shared_ptr<Rail::Owner> owner(link, link.get());
  std::string inactive;
  std::string failed;
  std::size_t failures = 0;
  std::exception_ptr first_failure;
  std::error_code cause;
  for (std::size_t i = 0; i < ports.size(); ++i) {
    // A device may be gone for good, and a port without an address for a while: the other rails do without it.
    try {
      if (ports[i].device->address().active) {
        link->rails_.push_back(std::make_shared<Rail>(executor, ports[i], i, options.rail, owner));
      } else {
        inactive +=
            (inactive.empty() ? "" : ", ") + ports[i].device->name() + ":" + std::to_string(ports[i].device->port());
      }
    } catch (const TransferError& error) {
      if (is_of_host(error.code())) {
        throw;
      }
      if (++failures == 1) {
        first_failure = std::current_exception();
        cause = error.code();
      }
      failed += (failed.empty() ? "" : "; ") + std::string(error.what());
    }
  }
  if (!link->rails_.empty()) {
    return link;
  }
  if (failures == 0) {
    throw TransferError(std::make_error_code(std::errc::network_down), "no rail is active: " + inactive);
  }
  if (failures == 1 && inactive.empty()) {
    std::rethrow_exception(first_failure);
  }
  throw TransferError(cause, "no rail can be used: " + failed + (inactive.empty() ? "" : "; not active: " + inactive));
}

Endpoint RdmaLink::endpoint() const {
  Endpoint endpoint;
  endpoint.message_bytes = message_bytes;
  endpoint.messages = messages;
  endpoint.checks = max_checks;
  endpoint.first_messages = first_messages;
  const auto add = [&](const Rail& rail) {
    endpoint.rails.push_back(rail.endpoint());
    endpoint.rails.back().regions = rail.domain()->region_keys();
  };
  if (joined_.empty()) {
    std::ranges::for_each(rails_, [&](const auto& rail) { add(*rail); });
  } else {
    std::ranges::for_each(joined_, [&](const Rail* rail) { add(*rail); });
  }
  return endpoint;
}

void RdmaLink::join(std::shared_ptr<kit::LinkHost> host,  // NOLINT(performance-unnecessary-value-param): is kept
                    const Endpoint& peer, Role role, kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  const std::string who = "peer " + in_quotes(host->peer().id) + ": ";
  if (const auto wrong = check_endpoint(peer, host->peer().regions); !wrong.empty()) {
    throw TransferError(errc::malformed_message, who + wrong);
  }
  std::vector<const RailEndpoint*> peers_rails;
  std::string own_numbers;
  for (const auto& rail : rails_) {
    const auto same = std::ranges::find(peer.rails, rail->endpoint().rail, &RailEndpoint::rail);
    own_numbers += (own_numbers.empty() ? "" : ", ") + std::to_string(rail->endpoint().rail);
    if (same != peer.rails.end()) {
      joined_.push_back(rail.get());
      peers_rails.push_back(&*same);
    }
  }
  if (joined_.empty()) {
    throw TransferError(errc::handshake_failed, who + "its first active rail is number " +
                                                    std::to_string(peer.rails.front().rail) +
                                                    ", this side's active ones are: " + own_numbers);
  }
  std::vector<std::uint64_t> numbers;
  std::vector<std::shared_ptr<const RailDomain>> domains;
  for (const Rail* const rail : joined_) {
    numbers.push_back(rail->endpoint().rail);
    domains.push_back(rail->domain());
  }
  regions_ = std::make_shared<LinkRegions>(
      std::move(numbers),
      [domains = std::move(domains)](std::size_t place, std::uint32_t number) {
        return domains[place]->keys_of(number);
      },
      LinkRegions::told(host->peer().regions, peers_rails), host->peer().next_region);
  host_ = host;
  kit::Failure failure;
  std::exception_ptr thrown;
  try {
    {
      const std::lock_guard lock(joining_mutex_);
      on_link_ = std::move(on_link);
      self_ = shared_from_this();
      timer_.expires_at(deadline);
      timer_.async_wait([weak = weak_from_this()](std::error_code ec) {
        const auto self = weak.lock();
        if (self && ec != asio::error::operation_aborted) {
          self->fail(errc::timed_out,
                     "peer " + in_quotes(self->host_->peer().id) + " did not greet on all rails in time");
        }
      });
    }
    host->when_abandoned([weak = weak_from_this(), executor = timer_.get_executor()] {
      asio::post(executor, [weak] {
        if (const auto self = weak.lock()) {
          self->fail(errc::cancelled, "a newer attempt has taken its place");
        }
      });
    });
    for (std::size_t i = 0; i < joined_.size() && !failure; ++i) {
      failure = joined_[i]->connect(host, {peer, *peers_rails[i], regions_, i}, role, options_.incarnation);
    }
  } catch (...) {
    thrown = std::current_exception();
  }
  if (!failure && !thrown) {
    return;
  }
  std::shared_ptr<RdmaLink> kept;
  if (!take_handler(kept)) {
    return;  // another rail broke meanwhile, and the handler has been told
  }
  if (thrown) {
    shut(errc::connection_lost, {});
    std::rethrow_exception(thrown);
  }
  shut(failure.code, failure.sentence);
  throw TransferError(failure.code, who + failure.sentence);
}

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
      rail = static_cast<std::size_t>(request.tag % joined_.size());
    } else {
      const std::size_t total = kit::LocalBytes(request).total();
      if (total >= options_.stripe_threshold && request.objects.size() > 1 &&
          !lands_on_itself(request, regions_->addresses_of_peers())) {
        const auto ranges = kit::cut_into_stripes(kit::LocalBytes(request), total, joined_.size());
        const auto batch = std::make_shared<kit::StripedOperation>(operation, ranges.size());
        for (std::size_t i = 0; i < ranges.size(); ++i) {
          joined_[i]->start(batch, ranges[i]);
        }
        return;
      }
      rail = next_rail_.fetch_add(1, std::memory_order_relaxed) % joined_.size();
    }
  }
  const std::size_t count = request.objects.size();
  const bool serves = place_.is_of_this_thread() && !led_channel_;
  joined_[rail]->start(std::make_shared<kit::StripedOperation>(std::move(operation), 1), {0, count},
                       serves ? &led_channel_ : nullptr);
}

/// Each rail has writes of its own.
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
    const auto until = kit::Clock::now() + hurried_goodbye_time;
    bool answered = false;
    while (!say_farewell(answered) && kit::Clock::now() < until) {
      const Pause pause{event_descriptors(), until};
      kit::wait_for({&pause, 1});
    }
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

bool RdmaLink::begin_serving() { return joined_.size() == 1 && place_.take(); }

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
