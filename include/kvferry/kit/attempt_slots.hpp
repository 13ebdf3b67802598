// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ATTEMPT_SLOTS_HPP
#define KVFERRY_KIT_ATTEMPT_SLOTS_HPP

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Bounds the handshakes of strangers whose data connections have not come yet, in all and by source. A new handshake
/// always gets a slot. If its source has its share already, the source's oldest handshake gives way. If there is no
/// free slot, the oldest handshake of the source that has most gives way. Not thread-safe.
class AttemptSlots {
 public:
  /// One of a peer's attempts. Numbers are those of a channel's attempts, each given once.
  struct Attempt {
    std::string peer_id;
    std::uint64_t number = 0;
  };

  explicit AttemptSlots(std::size_t slots) : slots_(slots), slots_of_source_(slots - slots / 4) {}

  /// @param entered has no slot yet.
  /// @return the attempt that has to give way; its slot is already released.
  [[nodiscard]] std::optional<Attempt> enter(Attempt entered, const std::string& source) {
    std::optional<Attempt> gives_way;
    const auto own = sources_.find(source);
    if (own != sources_.end() && own->second.size() >= slots_of_source_) {
      gives_way = own->second.front();
    } else if (holders_.size() >= slots_) {
      auto most = sources_.begin();
      for (auto it = sources_.begin(); it != sources_.end(); ++it) {
        most = it->second.size() > most->second.size() ? it : most;
      }
      gives_way = most->second.front();
    }
    if (gives_way) {
      leave(gives_way->number);
    }
    const std::uint64_t number = entered.number;
    auto& attempts = sources_[source];
    holders_.emplace(number, Holder{source, attempts.insert(attempts.end(), std::move(entered))});
    return gives_way;
  }

  /// Does nothing if the attempt has no slot.
  void leave(std::uint64_t number) {
    const auto holder = holders_.find(number);
    if (holder == holders_.end()) {
      return;
    }
    const auto source = sources_.find(holder->second.source);
    source->second.erase(holder->second.place);
    if (source->second.empty()) {
      sources_.erase(source);
    }
    holders_.erase(holder);
  }

  [[nodiscard]] std::size_t size() const noexcept { return holders_.size(); }
  /// Whether so many are here that one of them may have to give way. Long before all slots are taken: in a flood that takes no
  /// longer than a peer's connection needs. One alone is no crowd, however few slots there are.
  [[nodiscard]] bool crowded() const noexcept { return holders_.size() > 1 && holders_.size() * 16 >= slots_; }

 private:
  using Attempts = std::list<Attempt>;  ///< The oldest first.
  struct Holder {
    std::string source;
    Attempts::iterator place;
  };

  const std::size_t slots_;
  const std::size_t slots_of_source_;
  std::map<std::string, Attempts> sources_;
  std::map<std::uint64_t, Holder> holders_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_ATTEMPT_SLOTS_HPP
