// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/auto/road_acceptance.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

KVFERRY_INLINE RoadOffers RoadAcceptance::begin(const RoadOffers& asked, kit::Clock::time_point deadline) {
  const bool named = !asked.host.empty() && !roads_->host.empty();
  const bool same_host = named && asked.host == roads_->host;
  elsewhere_ = named && !same_host;
  std::vector<const Bytes*> endpoints;
  for (const RoadOffer& offer : asked.roads) {
    const OwnRoad* const own = roads_->find(offer.name);
    if (own == nullptr || std::ranges::find(ways_, own, &Way::own) != ways_.end()) {
      continue;
    }
    Way& way = ways_.emplace_back();
    way.name = offer.name;
    way.own = own;
    endpoints.push_back(&offer.endpoint);
    if (own->within_host && elsewhere_) {
      way.failure = on_another_host();
      way.kind = Reasons::Kind::usual;
    } else if (!own->road) {
      way.failure = {errc::no_path, own->why};
    } else if (own->within_host && !named) {
      way.failure = roads_->host.empty() ? on_unnamed_host() : peer_on_unnamed_host();
    } else if (!offer.why.empty()) {
      way.failure = offer.failure();
      way.kind = kind_of(*own, way.failure.code);
    } else {
      way.host = std::make_shared<RoadHost>(host_);
    }
  }
  host_->when_abandoned([weak = weak_from_this()] {
    if (const auto self = weak.lock()) {
      {
        const std::lock_guard lock(self->mutex_);
        self->over_ = true;
      }
      self->abandon_all_but(self->ways_.size());
    }
  });

  RoadOffers answer;
  answer.roads.reserve(ways_.size());  // what has been accepted is said
  answer.host = same_host ? asked.host : std::string();
  for (std::size_t i = 0; i < ways_.size(); ++i) {
    Way& way = ways_[i];
    if (way.host) {
      {
        const std::lock_guard lock(mutex_);
        ++pending_;
      }
      try {
        auto on_link = [self = shared_from_this(), i](std::error_code ec, const std::shared_ptr<kit::Link>& link,
                                                      std::string diagnostic) {
          self->ended(i, {ec, std::move(diagnostic)}, link);
        };
        RoadOffer offer{way.name, {}, {}};
        offer.endpoint = way.own->road->accept(way.host, *endpoints[i], deadline, std::move(on_link));
        answer.roads.push_back(std::move(offer));
        continue;
      } catch (...) {
        const std::lock_guard lock(mutex_);
        --pending_;
        way.failure = kit::failure_being_handled();
        way.kind = kind_of(*way.own, way.failure.code);
      }
    }
    answer.roads.push_back(not_offered(way.name, way.failure));
  }
  const auto awaited = std::ranges::count_if(ways_, [](const Way& way) { return way.host != nullptr; });
  host_->may_take_until(roads_->last_tried_by(static_cast<std::size_t>(awaited), deadline));
  const std::lock_guard lock(mutex_);
  if (--pending_ == 0 && !over_) {
    over_ = true;
    const auto failure = reasons(nullptr).failure(host_->peer().id);
    throw TransferError(failure.code, failure.sentence);
  }
  return answer;
}

KVFERRY_INLINE void RoadAcceptance::ended(std::size_t way, const kit::Failure& failure,
                                          const std::shared_ptr<kit::Link>& link) {
  kit::LinkHandler on_link;
  kit::Failure last;
  {
    const std::lock_guard lock(mutex_);
    const bool made = !failure && link;
    if (!made) {
      ways_[way].failure = failure ? failure : kit::Failure{errc::no_path, "no connection was made"};
      ways_[way].kind = kind_of(*ways_[way].own, ways_[way].failure.code);
    }
    --pending_;
    if (!over_ && (made || pending_ == 0)) {
      over_ = true;
      on_link = std::move(on_link_);
      last = made ? kit::Failure() : reasons(nullptr).failure(host_->peer().id);
    }
  }
  if (!on_link) {
    if (link) {
      link->shut(errc::cancelled, "the peer has come on another road");
    }
  } else if (last) {
    on_link(last.code, nullptr, last.sentence);
  } else {
    take(way, link, on_link);
  }
}

KVFERRY_INLINE void RoadAcceptance::take(std::size_t way, const std::shared_ptr<kit::Link>& link,
                                         const kit::LinkHandler& on_link) {
  Reasons others;
  {
    const std::lock_guard lock(mutex_);
    others = reasons(&ways_[way]);
  }
  say_why(roads_, host_->peer().id, *link, *ways_[way].own, others);
  ways_[way].host->take(*link);
  abandon_all_but(way);
  on_link({}, link, {});
}

KVFERRY_INLINE void RoadAcceptance::abandon_all_but(std::size_t way) {
  for (std::size_t i = 0; i < ways_.size(); ++i) {
    if (i != way && ways_[i].host) {
      ways_[i].host->abandon();
    }
  }
}

/// Of the roads that are better in this side's order, or of all. @param taken one of the peer's roads, which it has tried in
/// their order; null: none is.
KVFERRY_INLINE Reasons RoadAcceptance::reasons(const Way* taken) const {
  Reasons reasons;
  for (const OwnRoad& own : roads_->roads) {
    if (taken != nullptr && &own == taken->own) {
      break;
    }
    const auto way = std::ranges::find(ways_, &own, &Way::own);
    if (way == ways_.end() && own.within_host && elsewhere_) {
      reasons.add(own.name, on_another_host(), Reasons::Kind::usual);
    } else if (way == ways_.end()) {
      reasons.add(own.name, not_offered(), Reasons::Kind::missing);
    } else if (taken != nullptr && !way->failure && taken < &*way) {
      reasons.add(own.name, {errc::no_path, "the peer prefers " + taken->name}, way->kind);
    } else if (taken != nullptr) {
      add(reasons, *way);
    }
  }
  for (std::size_t i = 0; taken == nullptr && i < ways_.size(); ++i) {
    add(reasons, ways_[i]);
  }
  return reasons;
}

KVFERRY_INLINE void RoadAcceptance::add(Reasons& reasons, const Way& way) {
  reasons.add(way.name, way.failure ? way.failure : kit::Failure{errc::no_path, "the peer did not come on it"},
              way.kind);
}

}  // namespace kvferry::roads
