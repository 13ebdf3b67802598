// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/auto/road_dial.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/auto/road_offers.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/endpoint_codec.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

inline namespace internal {

/// Whether it may be that somebody on the way has made the road fail, to have another one taken: then none is. Two
/// processes of one host that are of different users are no such case.
KVFERRY_INLINE bool forbids_others(const OwnRoad& road, const std::error_code& cause) {
  return !road.within_host && (cause == errc::authentication_failed || cause == errc::encryption_mismatch);
}

}  // namespace internal

KVFERRY_INLINE void RoadDial::Way::fail(kit::Failure cause) {
  failure = std::move(cause);
  kind = kind_of(*own, failure.code);
}

KVFERRY_INLINE bool RoadDial::Progress::go_to(std::shared_ptr<RoadHost> road, std::string described) {
  const std::lock_guard lock(mutex_);
  current_ = std::move(road);
  described_ = std::move(described);
  return !over_;
}

KVFERRY_INLINE std::string RoadDial::Progress::described() {
  const std::lock_guard lock(mutex_);
  return described_;
}

KVFERRY_INLINE bool RoadDial::Progress::is_over() {
  const std::lock_guard lock(mutex_);
  return over_;
}

KVFERRY_INLINE void RoadDial::Progress::abandon() {
  std::shared_ptr<RoadHost> current;
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
    current = std::move(current_);
  }
  if (current) {
    current->abandon();
  }
}

KVFERRY_INLINE RoadDial::RoadDial(std::shared_ptr<const OwnRoads> roads, const std::string& peer_id)
    : roads_(std::move(roads)) {
  bool any = false;
  for (const OwnRoad& own : roads_->roads) {
    Way& way = ways_.emplace_back();
    way.own = &own;
    if (!own.road) {
      way.fail({errc::no_path, own.why});
      continue;
    }
    try {
      auto dial = own.road->dial(peer_id);
      way.local_endpoint = dial->local_endpoint();
      way.dial = std::move(dial);
      any = true;
    } catch (...) {
      way.fail(kit::failure_being_handled());
    }
  }
  if (!any) {
    const auto failure = reasons(ways_.size()).failure(peer_id);
    throw TransferError(failure.code, failure.sentence);
  }
}

KVFERRY_INLINE Bytes RoadDial::local_endpoint() {
  RoadOffers offers;
  offers.host = roads_->host;
  for (const Way& way : ways_) {
    offers.roads.push_back(way.dial ? RoadOffer{way.own->name, way.local_endpoint, {}}
                                    : not_offered(way.own->name, way.failure));
  }
  return kit::encode_endpoint(offers);
}

KVFERRY_INLINE void RoadDial::connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                                      kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  host_ = std::move(host);
  deadline_ = deadline;
  host_->when_abandoned([weak = std::weak_ptr(progress_)] {
    if (const auto progress = weak.lock()) {
      progress->abandon();
    }
  });
  std::error_code ec;
  auto answered = kit::decode_endpoint<RoadOffers>(remote_endpoint, ec);
  if (ec) {
    throw TransferError(ec, "peer " + in_quotes(host_->peer().id) + " answered with senseless roads: " + ec.message());
  }
  const bool same_host = !answered.host.empty() && answered.host == roads_->host;
  for (Way& way : ways_) {
    const auto offer = std::ranges::find(answered.roads, way.own->name, &RoadOffer::name);
    if (way.own->within_host && roads_->host.empty()) {
      way.fail(on_unnamed_host());
    } else if (way.own->within_host && !same_host && offer != answered.roads.end() &&
               offer->why == on_unnamed_host().sentence) {
      way.fail(peer_on_unnamed_host());
    } else if (way.own->within_host && !same_host) {
      way.fail(on_another_host());
      way.kind = Reasons::Kind::usual;
    } else if (!way.dial) {
      continue;
    } else if (offer == answered.roads.end()) {
      way.fail(not_offered());
    } else if (!offer->why.empty()) {
      way.fail(offer->failure());
    } else {
      way.remote_endpoint = std::move(offer->endpoint);
      continue;
    }
    way.dial.reset();
  }
  const auto tried = std::ranges::count_if(ways_, [](const Way& way) { return way.dial != nullptr; });
  host_->may_take_until(roads_->last_tried_by(static_cast<std::size_t>(tried), deadline));
  go_on(0, std::make_shared<kit::LinkHandler>(std::move(on_link)));
}

KVFERRY_INLINE void RoadDial::go_on(std::size_t way, const Handler& on_link) {
  const auto stay = host_->stay();
  if (!stay) {
    (*on_link)(errc::closed, nullptr, "the channel was closed");
    return;
  }
  for (; way < ways_.size(); ++way) {
    Way& tried = ways_[way];
    if (tried.dial) {
      const auto host = std::make_shared<RoadHost>(host_);
      const std::string others = reasons(way).sentence();
      if (!progress_->go_to(host, "road " + tried.own->name + (others.empty() ? others : "; " + others))) {
        (*on_link)(errc::cancelled, nullptr, "the attempt isn't wanted any more");
        return;
      }
      try {
        tried.dial->connect(
            host, tried.remote_endpoint, deadline_of(way),
            [this, way, host, on_link](std::error_code ec, std::shared_ptr<kit::Link> link, std::string diagnostic) {
              ended(way, *host, on_link, {ec, std::move(diagnostic)}, std::move(link));
            });
        return;
      } catch (...) {
        tried.fail(kit::failure_being_handled());
      }
    }
    if (forbids_others(*tried.own, tried.failure.code)) {
      give_up(way + 1, on_link);
      return;
    }
  }
  give_up(ways_.size(), on_link);
}

KVFERRY_INLINE void RoadDial::ended(std::size_t way, RoadHost& host, const Handler& on_link, kit::Failure failure,
                                    std::shared_ptr<kit::Link> link) {
  Way& tried = ways_[way];
  if (progress_->is_over()) {
    if (link) {
      link->shut(errc::cancelled, "the attempt isn't wanted any more");
    }
    (*on_link)(errc::cancelled, nullptr, "the attempt isn't wanted any more");
  } else if (!failure && link) {
    say_why(roads_, host_->peer().id, *link, *tried.own, reasons(way));
    host.take(*link);
    (*on_link)({}, std::move(link), {});
  } else if (failure.code == errc::closed) {
    (*on_link)(failure.code, nullptr, failure.sentence);  // this channel, whose other roads are being closed as well
  } else {
    tried.fail(failure ? std::move(failure) : kit::Failure{errc::no_path, "no connection was made"});
    if (forbids_others(*tried.own, tried.failure.code)) {
      give_up(way + 1, on_link);
    } else {
      go_on(way + 1, on_link);
    }
  }
}

KVFERRY_INLINE void RoadDial::give_up(std::size_t before, const Handler& on_link) const {
  const auto failure = reasons(before).failure(host_->peer().id);
  (*on_link)(failure.code, nullptr, failure.sentence);
}

KVFERRY_INLINE bool RoadDial::was_cut_off() const noexcept {
  const auto was_tried = [](const Way& way) { return way.dial != nullptr; };
  return std::ranges::any_of(ways_,
                             [&](const Way& way) { return was_tried(way) && kit::is_cut_off(way.failure.code); });
}

KVFERRY_INLINE Reasons RoadDial::reasons(std::size_t before) const {
  Reasons reasons;
  for (std::size_t i = 0; i < before; ++i) {
    reasons.add(ways_[i].own->name, ways_[i].failure, ways_[i].kind);
  }
  return reasons;
}

/// One that doesn't answer leaves time for those behind it, and for whoever joins the attempt with less.
KVFERRY_INLINE kit::Clock::time_point RoadDial::deadline_of(std::size_t way) const {
  const auto left = std::count_if(ways_.begin() + static_cast<std::ptrdiff_t>(way), ways_.end(),
                                  [](const Way& later) { return later.dial != nullptr; });
  const auto now = kit::Clock::now();
  if (left <= 1 || deadline_ <= now) {
    return deadline_;
  }
  return now + std::min<kit::Clock::duration>((deadline_ - now) / left, roads_->patience);
}

}  // namespace kvferry::roads
