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

KVFERRY_INLINE RoadDial::RoadDial(std::shared_ptr<const OwnRoads> roads, const std::string& peer_id)
    : roads_(std::move(roads)) {
  bool any = false;
  for (const OwnRoad& own : roads_->roads) {
    Way& way = ways_.emplace_back();
    way.own = &own;
    if (!own.road) {
      way.failure = {errc::no_path, own.why};
      continue;
    }
    try {
      auto dial = own.road->dial(peer_id);
      way.local_endpoint = dial->local_endpoint();
      way.dial = std::move(dial);
      any = true;
    } catch (...) {
      way.failure = kit::failure_being_handled();
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
    offers.roads.push_back({way.own->name, way.local_endpoint, way.failure.sentence});
  }
  return kit::encode_endpoint(offers);
}

KVFERRY_INLINE void RoadDial::connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                                      kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  host_ = std::move(host);
  deadline_ = deadline;
  std::error_code ec;
  auto answered = kit::decode_endpoint<RoadOffers>(remote_endpoint, ec);
  if (ec) {
    throw TransferError(ec, "peer " + in_quotes(host_->peer().id) + " answered with senseless roads: " + ec.message());
  }
  const bool same_host = !answered.host.empty() && answered.host == roads_->host;
  for (Way& way : ways_) {
    if (!way.dial) {
      continue;
    }
    const auto offer = std::ranges::find(answered.roads, way.own->name, &RoadOffer::name);
    if (way.own->within_host && !same_host) {
      way.failure = on_another_host();
      way.usual = true;
    } else if (offer == answered.roads.end()) {
      way.failure = not_offered();
    } else if (!offer->why.empty()) {
      way.failure = {errc::no_path, offer->why};
    } else {
      way.remote_endpoint = std::move(offer->endpoint);
      continue;
    }
    way.dial.reset();
  }
  go_on(0, std::make_shared<kit::LinkHandler>(std::move(on_link)));
}

KVFERRY_INLINE void RoadDial::go_on(std::size_t way, const Handler& on_link) {
  for (; way < ways_.size(); ++way) {
    if (!ways_[way].dial) {
      continue;
    }
    const auto host = std::make_shared<RoadHost>(host_);
    try {
      ways_[way].dial->connect(
          host, ways_[way].remote_endpoint, deadline_of(way),
          [this, way, host, on_link](std::error_code ec, std::shared_ptr<kit::Link> link, std::string diagnostic) {
            ended(way, *host, on_link, {ec, std::move(diagnostic)}, std::move(link));
          });
      return;
    } catch (...) {
      ways_[way].failure = kit::failure_being_handled();
    }
  }
  const auto failure = reasons(ways_.size()).failure(host_->peer().id);
  (*on_link)(failure.code, nullptr, failure.sentence);
}

KVFERRY_INLINE void RoadDial::ended(std::size_t way, RoadHost& host, const Handler& on_link, kit::Failure failure,
                                    std::shared_ptr<kit::Link> link) {
  if (!failure && link) {
    say_why(*roads_, host_->peer().id, *link, ways_[way].own->name, reasons(way));
    host.take(*link);
    (*on_link)({}, std::move(link), {});
  } else if (failure.code == errc::closed) {
    (*on_link)(failure.code, nullptr, failure.sentence);  // this channel, whose other roads are being closed as well
  } else {
    ways_[way].failure = failure ? std::move(failure) : kit::Failure{errc::no_path, "no connection was made"};
    go_on(way + 1, on_link);
  }
}

KVFERRY_INLINE Reasons RoadDial::reasons(std::size_t before) const {
  Reasons reasons;
  for (std::size_t i = 0; i < before; ++i) {
    reasons.add(ways_[i].own->name, ways_[i].failure, ways_[i].usual);
  }
  return reasons;
}

/// One that doesn't answer leaves time for those behind it.
KVFERRY_INLINE kit::Clock::time_point RoadDial::deadline_of(std::size_t way) const {
  const auto left = std::count_if(ways_.begin() + static_cast<std::ptrdiff_t>(way), ways_.end(),
                                  [](const Way& later) { return later.dial != nullptr; });
  const auto now = kit::Clock::now();
  return left <= 1 || deadline_ <= now ? deadline_ : now + (deadline_ - now) / left;
}

}  // namespace kvferry::roads
