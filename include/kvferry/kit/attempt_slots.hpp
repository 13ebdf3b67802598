// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ATTEMPT_SLOTS_HPP
#define KVFERRY_KIT_ATTEMPT_SLOTS_HPP

#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <string>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Bounds the handshakes of strangers whose data connections have not come yet, in all and by source. A new handshake
/// always gets a slot. If its source has its share already, the source's oldest handshake gives way. If there is no
/// free slot, the oldest handshake of the source that has most gives way. Not thread-safe.
class AttemptSlots {
 public:
  explicit AttemptSlots(std::size_t slots) : slots_(slots), slots_of_source_(slots - slots / 4) {}

  /// @return the id that has to give way; its slot is already released.
  [[nodiscard]] std::optional<std::string> enter(const std::string& id, const std::string& source) {
    leave(id);
    std::optional<std::string> gives_way;
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
      leave(*gives_way);
    }
    auto& ids = sources_[source];
    holders_.emplace(id, Holder{source, ids.insert(ids.end(), id)});
    return gives_way;
  }

  /// Does nothing if the id has no slot.
  void leave(const std::string& id) {
    const auto holder = holders_.find(id);
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

 private:
  using Ids = std::list<std::string>;  ///< The oldest first.
  struct Holder {
    std::string source;
    Ids::iterator place;
  };

  const std::size_t slots_;
  const std::size_t slots_of_source_;
  std::map<std::string, Ids> sources_;
  std::map<std::string, Holder> holders_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_ATTEMPT_SLOTS_HPP
