// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_TAG_MATCHER_HPP
#define KVFERRY_KIT_TAG_MATCHER_HPP

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>

#include <kvferry/kit/posted_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

// Bounds that both sides keep, so that each can hold the other to them.

/// Objects in one send or recv.
inline constexpr std::size_t max_paired_objects = std::size_t{1} << 20;
/// The most that unmatched recvs of one connection may take up, in units of 8 bytes.
inline constexpr std::size_t max_posted_cost = std::size_t{2} << 20;

/// Matches this side's sends to the peer's recvs by tag, first in first out, in the order in which each
/// side started them.
///
/// @tparam Post a posted recv's description of its buffers: a container with one element for each.
template <class Post>
class TagMatcher {
 public:
  explicit TagMatcher(std::shared_ptr<LinkHost> host) : memory_(std::move(host)) {}

  struct Match {
    std::uint64_t send = 0;
    std::uint64_t recv = 0;
    Post post;
  };

  /// @param order its place among the sends of a tag. @param id its name in the match.
  void add_send(std::uint64_t tag, std::uint64_t order, std::uint64_t id) { sends_[tag].emplace(order, id); }
  void remove_send(std::uint64_t tag, std::uint64_t order) {
    if (const auto it = sends_.find(tag); it != sends_.end()) {
      it->second.erase(order);
      drop_if_empty(sends_, it);
    }
  }

  /// @param recv the peer's id of it; later recvs have larger ones.
  /// @return false if the recvs that no send has met would exceed a limit: of this connection, of its peer, or in all.
  [[nodiscard]] bool add_post(std::uint64_t tag, std::uint64_t recv, Post post) {
    if (cost_of(post.size()) > max_posted_cost - cost_ || !memory_.take(bytes_of(post.size()))) {
      return false;
    }
    cost_ += cost_of(post.size());
    posts_[tag].emplace(recv, std::move(post));
    return true;
  }
  /// @return false if there is no such recv (any more).
  bool remove_post(std::uint64_t tag, std::uint64_t recv) {
    const auto it = posts_.find(tag);
    if (it == posts_.end()) {
      return false;
    }
    const auto post = it->second.find(recv);
    if (post == it->second.end()) {
      return false;
    }
    leave(post->second.size());
    it->second.erase(post);
    drop_if_empty(posts_, it);
    return true;
  }

  /// Takes the first send and the first recv of a tag out, if there are both.
  [[nodiscard]] std::optional<Match> match(std::uint64_t tag) {
    const auto sends = sends_.find(tag);
    const auto posts = posts_.find(tag);
    if (sends == sends_.end() || posts == posts_.end()) {
      return std::nullopt;
    }
    auto post = posts->second.extract(posts->second.begin());
    Match match{sends->second.begin()->second, post.key(), std::move(post.mapped())};
    sends->second.erase(sends->second.begin());
    leave(match.post.size());
    drop_if_empty(sends_, sends);
    drop_if_empty(posts_, posts);
    return match;
  }

  void clear_posts() {
    posts_.clear();
    cost_ = 0;
    memory_.clear();
  }

 private:
  /// The cost of a recv in units of 8 bytes: one for each buffer, and a constant for the recv itself.
  [[nodiscard]] static constexpr std::size_t cost_of(std::size_t buffers) noexcept { return buffers + 24; }
  [[nodiscard]] static constexpr std::size_t bytes_of(std::size_t buffers) noexcept {
    return cost_of(0) * 8 + buffers * sizeof(typename Post::value_type);
  }

  void leave(std::size_t buffers) noexcept {
    cost_ -= cost_of(buffers);
    memory_.give_back(bytes_of(buffers));
  }

  template <class Map>
  static void drop_if_empty(Map& map, typename Map::iterator it) {
    if (it->second.empty()) {
      map.erase(it);
    }
  }

  std::unordered_map<std::uint64_t, std::map<std::uint64_t, std::uint64_t>> sends_;  ///< By tag: order to id.
  std::unordered_map<std::uint64_t, std::map<std::uint64_t, Post>> posts_;           ///< By tag: recv to its buffers.
  std::size_t cost_ = 0;  ///< Of the recvs that no send has met.
  HeldMemory memory_;     ///< The same, as it counts for the peer and in all.
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_TAG_MATCHER_HPP
