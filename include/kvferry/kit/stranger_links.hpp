// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_STRANGER_LINKS_HPP
#define KVFERRY_KIT_STRANGER_LINKS_HPP

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <string>

#include <kvferry/config.hpp>

#include <kvferry/detail/descriptor_limit.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The links of peers that connected by themselves, the oldest first. Limits their number and their descriptors, in all
/// and by source. Not thread-safe.
class StrangerLinks {
 public:
  using Ids = std::list<std::string>;
  using Clock = std::chrono::steady_clock;

  /// A link that was used gives way when it has been out of use for so long.
  static constexpr std::chrono::seconds long_idle{60};

  struct Amount {
    std::size_t links = 0;
    std::size_t descriptors = 0;
  };

  /// @param bounds in all; one source may have three quarters of them.
  explicit StrangerLinks(const Amount& bounds)
      : bounds_(bounds), bounds_of_source_{three_quarters(bounds.links), three_quarters(bounds.descriptors)} {}

  /// Half of the descriptors that the process may have: the rest is for peers that the user has named, for the ports
  /// and for all else that the process does.
  [[nodiscard]] static Amount bounds(std::size_t max_peers) {
    return {max_peers, share_of_descriptors(2, 8, 1 << 20)};
  }

  /// Raises the bound if the process may have more descriptors now. If it may have fewer, the links that are here stay.
  void raise(const Amount& bounds) {
    if (bounds.descriptors > bounds_.descriptors) {
      bounds_.descriptors = bounds.descriptors;
      bounds_of_source_.descriptors = three_quarters(bounds.descriptors);
    }
  }

  /// Of which source a link has to go before one more has room; null if there is room.
  [[nodiscard]] const Ids* greedy(const std::string& source, std::size_t descriptors) const {
    const auto exceeds = [&](const Amount& used, const Amount& bounds) {
      return used.links + 1 > bounds.links || used.descriptors + descriptors > bounds.descriptors;
    };
    const auto own = sources_.find(source);
    if (exceeds(own == sources_.end() ? Amount() : own->second.used, bounds_of_source_)) {
      return own == sources_.end() ? &none_ : &own->second.ids;
    }
    if (!exceeds(used_, bounds_)) {
      return nullptr;
    }
    const auto most = std::ranges::max_element(
        sources_,
        [](const Amount& one, const Amount& other) {
          return one.descriptors + one.links < other.descriptors + other.links;
        },
        [](const auto& entry) { return entry.second.used; });
    return most == sources_.end() ? &none_ : &most->second.ids;
  }

  /// The link of these that gives way: the oldest one that was never used, else the one that has been out of use for
  /// longest, if for `long_idle` at least. When a link was used is known only as far as this was asked.
  /// @param take_used called with an id: whether its link is in use, or was used since the last call.
  /// @return null if there is none.
  template <class TakeUsed>
  [[nodiscard]] const std::string* idle(const Ids& ids, Clock::time_point now, const TakeUsed& take_used) {
    const std::string* longest = nullptr;
    Clock::time_point since = now - long_idle;
    for (const std::string& id : ids) {
      std::optional<Clock::time_point>& seen_used = holders_.find(id)->second.seen_used;
      if (take_used(id)) {
        seen_used = now;
      } else if (!seen_used) {
        return &id;
      } else if (*seen_used <= since) {
        longest = &id;
        since = *seen_used;
      }
    }
    return longest;
  }

  /// Enters a link, in place of the one that the id has.
  /// @param seen_used see `seen_used`.
  void enter(const std::string& id, const std::string& source, std::size_t descriptors,
             std::optional<Clock::time_point> seen_used = {}) {
    leave(id);
    Source& of = sources_[source];
    holders_.emplace(id, Holder{source, of.ids.insert(of.ids.end(), id), descriptors, seen_used});
    for (Amount* const used : {&of.used, &used_}) {
      ++used->links;
      used->descriptors += descriptors;
    }
  }

  /// When the id's link was last known to be used; nothing if never, or there is none.
  [[nodiscard]] std::optional<Clock::time_point> seen_used(const std::string& id) const {
    const auto holder = holders_.find(id);
    return holder == holders_.end() ? std::nullopt : holder->second.seen_used;
  }

  /// Does nothing if the id has no link here.
  void leave(const std::string& id) {
    const auto holder = holders_.find(id);
    if (holder == holders_.end()) {
      return;
    }
    const auto source = sources_.find(holder->second.source);
    for (Amount* const used : {&source->second.used, &used_}) {
      --used->links;
      used->descriptors -= holder->second.descriptors;
    }
    source->second.ids.erase(holder->second.place);
    if (source->second.ids.empty()) {
      sources_.erase(source);
    }
    holders_.erase(holder);
  }

  [[nodiscard]] const Amount& used() const noexcept { return used_; }

 private:
  struct Source {
    Amount used;
    Ids ids;
  };
  struct Holder {
    std::string source;
    Ids::iterator place;
    std::size_t descriptors = 0;
    std::optional<Clock::time_point> seen_used;
  };

  static constexpr std::size_t three_quarters(std::size_t all) { return all - all / 4; }

  Amount bounds_;
  Amount bounds_of_source_;
  const Ids none_;
  Amount used_;
  std::map<std::string, Source> sources_;
  std::map<std::string, Holder> holders_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_STRANGER_LINKS_HPP
