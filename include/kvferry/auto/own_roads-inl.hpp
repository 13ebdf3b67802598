// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/auto/own_roads.hpp>

#include <algorithm>
#include <fstream>

#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::roads {

KVFERRY_INLINE const OwnRoad* OwnRoads::find(const std::string& name) const {
  const auto it = std::ranges::find(roads, name, &OwnRoad::name);
  return it == roads.end() ? nullptr : &*it;
}

KVFERRY_INLINE kit::Clock::time_point OwnRoads::last_tried_by(std::size_t roads_tried,
                                                              kit::Clock::time_point deadline) const {
  const auto now = kit::Clock::now();
  if (roads_tried <= 1 || deadline <= now) {
    return now;
  }
  const auto each = std::min<kit::Clock::duration>(deadline - now, patience);
  return std::min(deadline, now + each * static_cast<kit::Clock::rep>(roads_tried - 1));
}

inline namespace internal {

/// Drawn by the kernel when it starts; no namespace of a container hides it.
inline constexpr const char* boot_id = "/proc/sys/kernel/random/boot_id";

}  // namespace internal

KVFERRY_INLINE std::string name_of_host() {
  std::ifstream file(boot_id);
  std::string name;
  std::getline(file, name);
  return name;
}

KVFERRY_INLINE void Reasons::add(const std::string& road, const kit::Failure& failure, Kind kind) {
  constexpr std::size_t longest = 300;
  const std::string why = failure.sentence.empty() ? failure.code.message() : failure.sentence;
  sentence_ += (sentence_.empty() ? "not " : "; not ") + road + ": " + escaped(why, longest);
  usual_ = usual_ && kind == Kind::usual;
  auto weight = kind == Kind::tried ? Weight::tried : kind == Kind::within_host ? Weight::within_host : Weight::none;
  if (weight == Weight::tried && failure.code.category() == error_category() && failure.code != condition::retryable &&
      failure.code != condition::cancelled) {
    weight = Weight::lasting;
  }
  if (weight > weight_ || (weight == weight_ && weight == Weight::tried)) {
    weight_ = weight;
    code_ = failure.code;
  }
}

KVFERRY_INLINE std::string Reasons::sentence() const { return sentence_; }

KVFERRY_INLINE kit::Failure Reasons::failure(const std::string& peer_id) const {
  const bool telling = code_ == errc::timed_out || code_ == errc::resource_limit ||
                       (code_.category() == error_category() && code_ != condition::retryable);
  return {telling ? code_ : make_error_code(errc::no_path), "no road to peer " + in_quotes(peer_id) + ": " + sentence_};
}

KVFERRY_INLINE kit::Failure on_another_host() { return {errc::no_path, "the peer is on another host"}; }

KVFERRY_INLINE kit::Failure on_unnamed_host() {
  return {errc::no_path, std::string("this host can't be told from others: no ") + boot_id};
}

KVFERRY_INLINE kit::Failure peer_on_unnamed_host() {
  return {errc::no_path, std::string("the peer can't tell its host from others: no ") + boot_id + " there"};
}

KVFERRY_INLINE kit::Failure not_offered() { return {errc::no_path, "the peer doesn't offer it"}; }

KVFERRY_INLINE void say_why(const std::shared_ptr<const OwnRoads>& roads, const std::string& peer_id, kit::Link& link,
                            const OwnRoad& taken, const Reasons& others) {
  const std::string why = others.sentence();
  const std::string name = link.path().starts_with(taken.name + " ") ? std::string() : "road " + taken.name;
  link.set_remark(name + (name.empty() || why.empty() ? "" : "; ") + why);
  link.when_taken([roads, &taken, peer_id, why, usual = others.usual()] {
    ++taken.counters->taken;
    taken.counters->fallbacks += usual ? 0 : 1;
    // With a cause the warnings have a rate of their own: none is left out because of many records that warn of nothing.
    const std::error_code cause = usual ? std::error_code() : make_error_code(errc::no_path);
    roads->logger->log(usual ? LogLevel::info : LogLevel::warning, "path_chosen", peer_id, cause,
                       [&] { return "road " + taken.name + (why.empty() ? std::string() : "; " + why); });
  });
}

}  // namespace kvferry::roads
