// SPDX-License-Identifier: Apache-2.0
// The beginning of a link: its queue pairs are made and joined with the peer's.
#include "rdma_link.hpp"

#include <asio/post.hpp>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <span>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/failure.hpp>
#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

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
        link->rails_.push_back(
            std::make_shared<Rail>(executor, ports[i], ports[i].domains->for_link(), i, options.rail, owner));
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
    link->add_further(ports);
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

/// In rounds, one queue pair for each rail: what there is no room for for one rail, the others can't use, either.
void RdmaLink::add_further(const std::vector<RailPort>& ports) {
  const auto firsts = rails_;
  const std::shared_ptr<Rail::Owner> owner(shared_from_this(), this);
  rails_.reserve(firsts.size() * options_.queue_pairs);
  try {
    for (std::size_t have = 1; have < options_.queue_pairs; ++have) {
      std::vector<std::shared_ptr<Rail>> round;
      for (const auto& first : firsts) {
        const std::uint64_t number = first->endpoint().rail;
        round.push_back(std::make_shared<Rail>(timer_.get_executor(), ports[number], first->domain(), number,
                                               options_.rail, owner));
        const RailEndpoint& made = round.back()->endpoint();
        // The peer is told all but two numbers only once.
        const auto as_first = [&](const auto field) { return made.*field == first->endpoint().*field; };
        if (!as_first(&RailEndpoint::gid) || !as_first(&RailEndpoint::lid) || !as_first(&RailEndpoint::mtu) ||
            !as_first(&RailEndpoint::gid_type) || !as_first(&RailEndpoint::global_route)) {
          return;  // the port's address has just changed
        }
      }
      for (std::size_t i = 0; i < round.size(); ++i) {
        rails_.insert(rails_.begin() + static_cast<std::ptrdiff_t>(i * (have + 1) + have), round[i]);
      }
    }
  } catch (const TransferError&) {
    // There is no room for more: those that there are will do.
  }
}

Endpoint RdmaLink::endpoint() const {
  Endpoint endpoint;
  endpoint.message_bytes = message_bytes;
  endpoint.messages = messages;
  endpoint.checks = max_checks;
  endpoint.first_messages = first_messages;
  const auto add = [&](const Rail& rail) {
    const RailEndpoint& own = rail.endpoint();
    if (const auto first = std::ranges::find(endpoint.rails, own.rail, &RailEndpoint::rail);
        first != endpoint.rails.end()) {
      if (!first->further) {
        first->further.emplace();
      }
      first->further->push_back({own.queue_pair, own.packet_number});
      return;
    }
    endpoint.rails.push_back(own);
    endpoint.rails.back().regions = rail.domain()->region_keys();
  };
  if (joined_.empty()) {
    std::ranges::for_each(rails_, [&](const auto& rail) { add(*rail); });
  } else {
    std::ranges::for_each(joined_, [&](const Rail* rail) { add(*rail); });
  }
  return endpoint;
}

std::vector<RailEndpoint> RdmaLink::pick_joined(const Endpoint& peer, const std::string& who) {
  std::string own_numbers;
  std::vector<std::pair<std::span<const std::shared_ptr<Rail>>, const RailEndpoint*>> rails;
  std::size_t pairs = max_queue_pairs;
  for (auto first = rails_.begin(); first != rails_.end();) {
    const std::uint64_t number = (*first)->endpoint().rail;
    const auto end = std::find_if(first, rails_.end(), [&](const auto& one) { return one->endpoint().rail != number; });
    own_numbers += (own_numbers.empty() ? "" : ", ") + std::to_string(number);
    const auto same = std::ranges::find(peer.rails, number, &RailEndpoint::rail);
    if (same != peer.rails.end()) {
      rails.emplace_back(std::span(first, end), &*same);
      pairs = std::min({pairs, rails.back().first.size(), queue_pairs_of(*same)});
    }
    first = end;
  }
  if (rails.empty()) {
    throw TransferError(errc::handshake_failed, who + "its first active rail is number " +
                                                    std::to_string(peer.rails.front().rail) +
                                                    ", this side's active ones are: " + own_numbers);
  }
  joined_rails_ = rails.size();
  std::vector<RailEndpoint> peers;
  for (std::size_t pair = 0; pair < pairs; ++pair) {
    for (const auto& [own, peers_rail] : rails) {
      joined_.push_back(own[pair].get());
      peers.push_back(queue_pair_of(*peers_rail, pair));
    }
  }
  const Rail* last = nullptr;
  std::erase_if(rails_, [&](const auto& rail) {
    const bool further = last != nullptr && last->endpoint().rail == rail->endpoint().rail;
    last = further ? last : rail.get();
    return further && std::ranges::find(joined_, rail.get()) == joined_.end();
  });
  return peers;
}

void RdmaLink::join(std::shared_ptr<kit::LinkHost> host,  // NOLINT(performance-unnecessary-value-param): is kept
                    const Endpoint& peer, Role role, kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  const std::string who = "peer " + in_quotes(host->peer().id) + ": ";
  if (const auto wrong = check_endpoint(peer, host->peer().regions); !wrong.empty()) {
    throw TransferError(errc::malformed_message, who + wrong);
  }
  const std::vector<RailEndpoint> peers_pairs = pick_joined(peer, who);
  std::vector<std::uint64_t> numbers;
  std::vector<std::shared_ptr<const RailDomain>> domains;
  std::vector<const RailEndpoint*> peers_rails;
  for (const Rail* const rail : std::span(joined_).first(joined_rails_)) {
    numbers.push_back(rail->endpoint().rail);
    domains.push_back(rail->domain());
    peers_rails.push_back(&*std::ranges::find(peer.rails, numbers.back(), &RailEndpoint::rail));
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
      failure =
          joined_[i]->connect(host, {peer, peers_pairs[i], regions_, i % joined_rails_}, role, options_.incarnation);
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

}  // namespace kvferry::rdma
