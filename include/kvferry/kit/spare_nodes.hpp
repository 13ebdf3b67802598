// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_SPARE_NODES_HPP
#define KVFERRY_KIT_SPARE_NODES_HPP

#include <array>
#include <cstddef>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Nodes that were taken out of a map and wait to be put into it again: while few entries come and go, nothing is
/// allocated. Guarded as the map is.
template <class Map>
class SpareNodes {
 public:
  using Iterator = typename Map::iterator;

  /// Adds an entry with an empty value, under a key that the map doesn't have (unless it may have it twice).
  Iterator add(Map& map, typename Map::key_type key) {
    if (count_ == 0) {
      return entry(map.emplace(std::move(key), typename Map::mapped_type()));
    }
    auto node = std::move(nodes_[--count_]);
    node.key() = std::move(key);
    return entry(map.insert(std::move(node)));
  }

  /// Takes an entry out. @return its value.
  [[nodiscard]] typename Map::mapped_type take(Map& map, Iterator taken) {
    auto value = std::exchange(taken->second, {});
    drop(map, taken);
    return value;
  }

  /// Takes an entry out whose value is empty.
  void drop(Map& map, Iterator dropped) {
    auto node = map.extract(dropped);
    if (count_ < nodes_.size()) {
      nodes_[count_++] = std::move(node);
    }
  }

 private:
  [[nodiscard]] static Iterator entry(Iterator added) { return added; }
  template <class Inserted>
  [[nodiscard]] static Iterator entry(const Inserted& inserted) {
    if constexpr (requires { inserted.position; }) {
      return inserted.position;
    } else {
      return inserted.first;
    }
  }

  std::array<typename Map::node_type, 4> nodes_;
  std::size_t count_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_SPARE_NODES_HPP
